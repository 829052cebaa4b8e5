"""From a trained student to what the package ships."""

from pathlib import Path

import torch
from torch import Tensor

from offload_moe.demo.split import CORRECTED, Split
from scripts.make_demo.recipe import Recipe
from scripts.make_demo.router import finish_router
from scripts.make_demo.student import Student

_SHIPPED = torch.bfloat16  # what the checkpoint is written in


@torch.no_grad()
def to_split(student: Student, text: Tensor, recipe: Recipe) -> Split:
    """`text` int64 [sequences, positions]: what the routers' final scale and zero point are fitted on."""
    routers = []
    for layer, normed in zip(student.layers, _router_inputs(student, text), strict=True):
        routers.append(finish_router(layer.router.detach(), normed, recipe.top_k, recipe.router_ridge))
    return Split(
        groups=torch.stack([layer.groups for layer in student.layers]).to(torch.uint8),
        router=torch.stack(routers).to(_SHIPPED),
        corrections={
            module: (_stacked(student, module, "left"), _stacked(student, module, "right")) for module in CORRECTED
        },
        norms={name: norm.detach().to(_SHIPPED) for name, norm in student.norms.items()},
        top_k=recipe.top_k,
    )


def save_split(split: Split, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in split.tensors().items()}, path)


def _stacked(student: Student, module: str, side: str) -> Tensor:
    return torch.stack([layer.corrections[f"{module}_{side}"].detach() for layer in student.layers]).to(_SHIPPED)


def _router_inputs(student: Student, text: Tensor) -> list[Tensor]:
    """What each split layer sees, [N, H]."""
    seen: list[list[Tensor]] = [[] for _ in student.layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0].flatten(0, -2)))
        for layer, kept in zip(student.layers, seen, strict=True)
    ]
    for batch in text.split(4):
        student(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]
