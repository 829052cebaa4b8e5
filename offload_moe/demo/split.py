"""The split of the dense model into experts: computed once by `scripts/make_demo`, shipped as `split.safetensors`.

Shapes: L layers that are split, A all layers, E experts, I intermediate, H hidden, R rank of a correction.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

CORRECTED = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The experts of the last L layers, and the learned corrections for inactive neurons.

    groups: uint8 [L, I], the expert of each neuron, E for the shared expert. router: [L, E, H]; the `top_k` highest
    scores choose. corrections: per module of `CORRECTED` the factors ([L, out, R], [L, R, in]) of a weight's addend.
    norms: "input_layernorm" and "post_attention_layernorm" [A, H], "norm" [H].
    """

    groups: Tensor
    router: Tensor
    corrections: Mapping[str, tuple[Tensor, Tensor]]
    norms: Mapping[str, Tensor]
    top_k: int

    @property
    def num_layers(self) -> int:
        return len(self.groups)

    @property
    def num_experts(self) -> int:
        return self.router.shape[1]

    def members(self, layer: int) -> tuple[Tensor, Tensor]:
        """Neuron numbers of the shared expert, int64 [S], and of the routed ones, int64 [E, W]."""
        groups = self.groups[layer].long()
        routed = [(groups == expert).nonzero().flatten() for expert in range(self.num_experts)]
        return (groups == self.num_experts).nonzero().flatten(), torch.stack(routed)

    def corrected(self, layer: int, module: str, weight: Tensor) -> Tensor:
        """The fp32 weight of one module of a split layer, [out, in]."""
        left, right = self.corrections[module]
        return weight + left[layer].float() @ right[layer].float()

    def tensors(self) -> dict[str, Tensor]:
        """The content of `split.safetensors`."""
        factors = {}
        for module in CORRECTED:
            factors[f"{module}.left"], factors[f"{module}.right"] = self.corrections[module]
        return {
            "groups": self.groups,
            "router": self.router,
            "top_k": torch.tensor(self.top_k),
            **factors,
            **self.norms,
        }


def split_bytes() -> bytes:
    """The bytes of the file in the package."""
    return files("offload_moe.demo").joinpath("split.safetensors").read_bytes()


def parse_split(data: bytes) -> Split:
    """Read a split file."""
    from safetensors.torch import load

    tensors = load(data)
    return Split(
        groups=tensors["groups"],
        router=tensors["router"],
        corrections={module: (tensors[f"{module}.left"], tensors[f"{module}.right"]) for module in CORRECTED},
        norms={name: tensors[name] for name in NORMS},
        top_k=int(tensors["top_k"]),
    )


def digest(data: bytes, *more: str) -> str:
    """Eight hexadecimal digits of the hash of a split file and the given texts."""
    return hashlib.sha256(data + "\n".join(more).encode()).hexdigest()[:8]
