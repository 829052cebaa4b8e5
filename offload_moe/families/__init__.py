"""Adapters for the experts classes outside transformers' experts registry, one small file each.

An adapter describes where the experts' parameters are and passes (hidden, expert ids, weights) to the experts bound in
their place. Model code stays transformers' own: only the forward of the module that owns the experts is replaced.
"""

from collections.abc import Iterable

from torch import nn

from offload_moe.families import dbrx, jetmoe, llama4, longcat_flash, nllb_moe, step3p7, switch_transformers
from offload_moe.families.extended import extended_adapter
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
_BUILT_IN = {adapter.class_name: adapter for adapter in ADAPTERS}


def find_adapter(module: nn.Module) -> Adapter | None:
    """The adapter for the class of a module; None where it has none.

    Raises: ConfigError where it is that of a broken extension.
    """
    name = type(module).__name__
    adapter = _BUILT_IN[name] if name in _BUILT_IN else extended_adapter(name)
    return adapter if adapter is not None and adapter.fits(module) else None


def is_left_alone(module: nn.Module, adapters: Iterable[Adapter]) -> bool:
    """Whether one of the adapters declares that a module of its family stays dense, though it looks like experts."""
    name = type(module).__name__
    return any(name in adapter.left_alone and adapter.is_of_family(module) for adapter in adapters)


__all__ = ["ADAPTERS", "Adapter", "Between", "Bound", "Description", "Part", "find_adapter", "is_left_alone"]
