"""Forward hooks, and which modules a token may pass by without calling them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.utils import output_capturing

from offload_moe.experts.observer import HookObserver

Hooks = Mapping[int, Any]


def hooks_of(modules: Iterable[nn.Module]) -> list[Hooks]:
    """The registries of these modules and those of all modules, live; for `are_watched`."""
    own = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return [_global_forward_hooks, _global_forward_pre_hooks, *own]


def are_watched(registries: Iterable[Hooks]) -> bool:
    """Whether any hook in them takes something from a module in this call."""
    return any(not _is_idle(hook) for hooks in registries if hooks for hook in hooks.values())


class Bypass:
    """Modules that a token pass does not call, because it does their work itself.

    A hook on one of them, or a forward in place of its own, sends the token through the modules; `HookObserver` says
    which hooks do not.
    """

    def __init__(self, modules: Sequence[nn.Module], observed: Iterable[Hooks]) -> None:
        """modules: as they are now. observed: those of their registries whose observers the pass calls."""
        self._modules = modules
        self._observed = list(observed)
        theirs = {id(hooks) for hooks in self._observed}
        self._silent = [hooks for hooks in hooks_of(modules) if id(hooks) not in theirs]
        self._attributes = [vars(module) for module in modules]
        self._forwards = self._forwards_now()

    @property
    def is_clear(self) -> bool:
        if any(self._silent) and are_watched(self._silent):
            return False
        if any(self._observed) and not have_only_observers(self._observed):
            return False
        return all(map(is_, self._forwards_now(), self._forwards))

    def changed_modules(self) -> Iterator[nn.Module]:
        """Those that keep it from being clear; none where a hook of all modules does."""
        for module, forward, attributes in zip(self._modules, self._forwards, self._attributes, strict=True):
            hooks = [module._forward_hooks, module._forward_pre_hooks]
            silent = [each for each in hooks if not any(each is observed for observed in self._observed)]
            observed = [each for each in hooks if any(each is observed for observed in self._observed)]
            is_same = attributes.get("forward") is forward
            if not is_same or are_watched(silent) or not have_only_observers(observed):
                yield module

    def _forwards_now(self) -> list[Any]:
        return [attributes.get("forward") for attributes in self._attributes]


def have_only_observers(registries: Iterable[Hooks]) -> bool:
    return all(
        isinstance(hook, HookObserver) or _is_idle(hook) for hooks in registries if hooks for hook in hooks.values()
    )


def is_capturing() -> bool:
    """Whether transformers captures outputs of modules in this thread's call."""
    return bool(output_capturing._active_collector.get())


def _is_idle(hook: object) -> bool:
    """Whether it is one of the hooks that transformers captures outputs with, and this thread's call captures nothing.

    They are installed by the first call for hidden states, attentions or router logits, and stay.
    """
    return getattr(hook, "__module__", None) == output_capturing.__name__ and not is_capturing()
