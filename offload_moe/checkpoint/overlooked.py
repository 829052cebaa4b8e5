"""Modules that look like routed experts and are not bound, which would otherwise silently run unconverted."""

from collections.abc import Iterable, Sequence

from torch import nn

from offload_moe.families import ADAPTERS, Adapter, is_left_alone
from offload_moe.families.routers import ROUTER_NAMES

ROUTER_CLASSES = ("router", "topk", "gating")


def overlooked_experts(model: nn.Module, bound: Sequence[str], adapters: Sequence[Adapter] = ADAPTERS) -> list[str]:
    """Names of the outermost modules that look like routed experts and are not among, in or around the bound ones.

    adapters: those whose classes are left alone where they say so.
    """
    alone = [name for name, module in model.named_modules() if is_left_alone(module, adapters)]
    found: list[str] = []
    for name, module in model.named_modules():
        if _is_inside(name, (*bound, *alone, *found)) or any(_is_inside(inner, (name,)) for inner in bound):
            continue
        if _looks_like_experts(name, module) or _routes(module):
            found.append(name)
    return found


def _is_inside(name: str, outer: Iterable[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in outer)


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2].lower()
    kind = type(module).__name__.lower()
    if "shared" in last or "shared" in kind or not any(True for _ in module.parameters()):
        return False
    return "expert" in kind or ("experts" in last and isinstance(module, nn.ModuleList | nn.ModuleDict))


def _routes(module: nn.Module) -> bool:
    """Whether a child is a router by name and by type, so that its experts must be inside the same module."""
    return any(
        name in ROUTER_NAMES and any(word in type(child).__name__.lower() for word in ROUTER_CLASSES)
        for name, child in module.named_children()
    )
