"""Experts modules that call what is bound to them, without asking the registry for it every time."""

from typing import Any

from torch import nn

from offload_moe.checkpoint.experts import is_experts_module
from offload_moe.experts.attach import EXPERTS_FUNCTION, bound_experts


def shorten_dispatch(model: nn.Module) -> int:
    """Give every bound experts module its own experts as its forward. Returns how many."""
    num_shortened = 0
    modules: list[Any] = list(model.modules())
    for module in modules:
        bound = bound_experts(module)
        if (
            bound is not None
            and is_experts_module(module)
            and module.config._experts_implementation == EXPERTS_FUNCTION
        ):
            module.forward = bound
            num_shortened += 1
    return num_shortened
