"""Forward hooks, and who may do without the modules that they are hooked to."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.utils import output_capturing

Hooks = Mapping[int, Any]


class HookObserver:
    """A hook that only observes: it changes nothing, and needs no more than a module's output.

    Code that computes several modules at once may call it later, without the module's input.
    """


def hooks_of(modules: Iterable[nn.Module]) -> list[Hooks]:
    """The registries of these modules and those of all modules, live; for `are_watched`."""
    own = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return [_global_forward_hooks, _global_forward_pre_hooks, *own]


def are_watched(registries: Iterable[Hooks]) -> bool:
    """Whether any hook in them takes something from a module in this call."""
    return any(not _is_idle(hook) for hooks in registries if hooks for hook in hooks.values())


def have_only_observers(registries: Iterable[Hooks]) -> bool:
    return all(
        isinstance(hook, HookObserver) or _is_idle(hook) for hooks in registries if hooks for hook in hooks.values()
    )


def _is_idle(hook: object) -> bool:
    """Whether it is one of the hooks that transformers captures outputs with, and this thread's call captures nothing.

    They are installed by the first call that asks for hidden states, attentions or router logits, and stay.
    """
    return (
        getattr(hook, "__module__", None) == output_capturing.__name__ and not output_capturing._active_collector.get()
    )
