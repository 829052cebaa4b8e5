"""Forward hooks, and who may do without the modules that they are hooked to."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

Hooks = Mapping[int, Any]


class Onlooker:
    """A hook that changes nothing and wants no more than to be told, with a module's output where it is given one.

    Whoever computes several modules at once may call it a little later, and without the module's input.
    """


def hooks_of(modules: Iterable[nn.Module]) -> list[Hooks]:
    """The registries of these modules and those of all modules, live: `any` of them says that a module is watched."""
    own = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return [_global_forward_hooks, _global_forward_pre_hooks, *own]


def have_only_onlookers(registries: Iterable[Hooks]) -> bool:
    return all(isinstance(hook, Onlooker) for hooks in registries if hooks for hook in hooks.values())
