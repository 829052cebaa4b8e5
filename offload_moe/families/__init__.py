"""Adapters for the experts classes outside transformers' experts registry, one small file each.

An adapter describes where the experts' parameters are and passes (hidden, expert ids, weights) to the experts bound in
their place. Model code stays transformers' own: only the forward of the module that owns the experts is replaced.
"""

from torch import nn

from offload_moe.families import dbrx, jetmoe, llama4, longcat_flash, nllb_moe, step3p7, switch_transformers
from offload_moe.families.protocol import Adapter, Between, Bound, Description, Part

ADAPTERS: tuple[Adapter, ...] = (
    dbrx.ADAPTER,
    jetmoe.ADAPTER,
    llama4.ADAPTER,
    longcat_flash.ADAPTER,
    nllb_moe.ADAPTER,
    step3p7.ADAPTER,
    switch_transformers.ADAPTER,
)


def find_adapter(module: nn.Module) -> Adapter | None:
    """The adapter for the class of a module; None where it has none."""
    return next((adapter for adapter in ADAPTERS if adapter.fits(module)), None)


def is_left_alone(module: nn.Module) -> bool:
    """Whether an adapter declares that a module of its family stays dense, though it looks like experts."""
    kind = type(module)
    return any(kind.__name__ in adapter.left_alone and f".{adapter.family}." in kind.__module__ for adapter in ADAPTERS)


__all__ = ["ADAPTERS", "Adapter", "Between", "Bound", "Description", "Part", "find_adapter", "is_left_alone"]
