"""Routers that choose the greatest of a softmax: one kernel call.

T tokens, H hidden, E experts, K top-k.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.decode.dense import number_linear
from offload_moe.decode.probe import TOLERANCE, Refused, agree, answer, probes, structure
from offload_moe.families.layer_spec import RouterSpec
from offload_moe.families.routers import declared_routers
from offload_moe.native import kernels

NEGLIGIBLE = 1e-30  # experts whose shares vanish are tied, and either choice of them adds nothing
TIED = 1e-6  # logits nearer than that have shares that may round to the same number
PARAMETERS = ({"weight"}, {"weight", "bias"})

Routed = tuple[Tensor, Tensor, Tensor]


class StepRouter:
    """The forward of one router: tokens in fp32 are routed here, each with the bits it has alone."""

    def __init__(self, router: Any, *, top_k: int, is_of_chosen: bool) -> None:
        self._own_forward: Callable[[Tensor], Routed] = router.forward
        self.num_experts, self.hidden_size = router.weight.shape
        self.top_k = top_k
        linear = number_linear(router.weight.detach(), getattr(router, "bias", None))
        self.kernel = kernels.RouterKernel(linear, top_k=top_k, is_of_chosen=is_of_chosen)

    def __call__(self, hidden_states: Tensor) -> Routed:
        """hidden ``[..., H]`` -> logits ``[T, E]``, weights ``[T, K]``, ids ``[T, K]``."""
        if hidden_states.dtype != torch.float32 or hidden_states.requires_grad:
            return self._own_forward(hidden_states)
        routed = room_for_routed(self.kernel, hidden_states.numel() // self.hidden_size)
        self.kernel.step(hidden_states.contiguous(), *routed)
        return routed


def room_for_routed(kernel: kernels.RouterKernel, num_tokens: int = 1) -> Routed:
    """Logits ``[T, E]``, weights ``[T, K]``, ids ``[T, K]``."""
    shape = num_tokens, kernel.top_k
    return torch.empty(num_tokens, kernel.num_experts), torch.empty(shape), torch.empty(shape, dtype=torch.int64)


def shorten_routers(model: nn.Module) -> int:
    """Make every router that takes the greatest of a softmax a kernel call. Returns how many.

    Its declaration says whether it does, and a probe checks it; of a layer that is not declared, probes find it out.
    Results differ by rounding.
    """
    declared = declared_routers(model)
    is_of_chosen: dict[Hashable, bool | None] = {}
    num_shortened = 0
    modules: list[Any] = [module for module in model.modules() if _is_candidate(module)]
    for module in modules:
        kind = structure(module)
        if kind not in is_of_chosen:
            is_of_chosen[kind] = _recognized(module, declared.get(module))
        found = is_of_chosen[kind]
        if found is not None:
            module.forward = StepRouter(module, top_k=module.top_k, is_of_chosen=found)
            num_shortened += 1
    return num_shortened


def _is_candidate(module: Any) -> bool:
    if set(module._parameters) not in PARAMETERS or module._buffers or list(module.children()):
        return False
    weight = module.weight
    is_plain = all(p is not None and p.dtype == torch.float32 and p.is_cpu for p in module._parameters.values())
    top_k = getattr(module, "top_k", None)
    return is_plain and weight.dim() == 2 and isinstance(top_k, int) and 1 <= top_k <= len(weight)


@torch.inference_mode()
def _recognized(module: Any, spec: RouterSpec | None) -> bool | None:
    """Whether its weights are shares of the chosen experts or of all; None where it is another kind of router."""
    if spec is not None and not spec.is_plain:
        return None
    inputs = probes((8, module.weight.shape[1]), torch.float32, module.weight.device)
    for is_of_chosen in (True, False) if spec is None else (spec.is_normalized,):
        step = StepRouter(module, top_k=module.top_k, is_of_chosen=is_of_chosen)
        if all(_same(module, step, x[None]) for each in inputs for x in each):
            return is_of_chosen
    return None


def _same(module: nn.Module, step: StepRouter, x: Tensor) -> bool:
    try:
        expected = answer(module.forward, x)
    except Refused:
        return False
    if not isinstance(expected, tuple) or len(expected) != 3 or not all(isinstance(part, Tensor) for part in expected):
        return False
    logits, weights, ids = step(x)
    if not agree(logits, expected[0], is_exact=False):
        return False
    # An absolute error of logits is a relative one of their exponentials, above and below the line of a share.
    tolerance = TOLERANCE[torch.float32] + 2 * float((logits - expected[0]).abs().max())
    return agree(weights, expected[1], is_exact=False, tolerance=tolerance) and _chooses_alike(ids, expected)


def _chooses_alike(ids: Tensor, expected: Routed) -> bool:
    """Whether these are the experts that were expected, or others whose logits differ by rounding alone."""
    logits, weights, expected_ids = expected
    distance = (logits.gather(-1, ids) - logits.gather(-1, expected_ids)).abs()
    limit = TIED + TOLERANCE[torch.float32] * logits.abs().max()
    return bool((distance[weights > NEGLIGIBLE] <= limit).all())
