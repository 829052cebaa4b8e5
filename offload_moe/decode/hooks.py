"""Forward hooks, and which modules a token may pass by without calling them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle
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


class Forwards:
    """The attributes `forward` of some modules, as they are now."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._attributes = [vars(module) for module in modules]
        self._found = self._read()

    @property
    def are_kept(self) -> bool:
        """Whether none was replaced since."""
        now = self._read()
        if now == self._found:
            return True
        if any(map(_differ, self._modules, now, self._found)):
            return False
        self._found = now
        return True

    def replaced(self) -> Iterator[nn.Module]:
        """Modules with another forward than at first."""
        for module, now, found in zip(self._modules, self._read(), self._found, strict=True):
            if _differ(module, now, found):
                yield module

    def _read(self) -> list[Any]:
        return list(map(dict.get, self._attributes, repeat("forward")))


def _differ(module: nn.Module, first: Any, second: Any) -> bool:
    """Whether two values of a module's attribute `forward` are different forwards.

    Code that sets one and puts the former back, as accelerate does, leaves the bound method of the class in an
    attribute that was not there before.
    """
    own = (None, MethodType(type(module).forward, module))
    return first is not second and not (first in own and second in own)


class Bypass:
    """Modules that a token pass does not call, because it does their work itself.

    A hook on one of them, or a forward in place of its own, sends the token through the modules; `HookObserver` says
    which hooks do not.
    """

    def __init__(self, modules: Sequence[nn.Module], observed: Iterable[Hooks]) -> None:
        """modules: as they are now. observed: those of their registries whose observers the pass calls."""
        self._modules = modules
        self._observed = {id(hooks) for hooks in observed}
        self._forwards = Forwards(modules)
        self._last_hook = -1  # of all hooks, the last one that is known to be none of these modules

    @property
    def is_clear(self) -> bool:
        """Where nothing is captured: whether a pass may do without these modules."""
        last_hook = RemovableHandle.next_id  # counts hooks of all modules
        if self._last_hook != last_hook:
            if any(self._has_hooks(module) for module in self._modules) or are_watched(hooks_of(())):
                return False
            self._last_hook = last_hook
        return self._forwards.are_kept

    def changed_modules(self) -> Iterator[nn.Module]:
        """Those that keep it from being clear; none where a hook of all modules does."""
        replaced = set(self._forwards.replaced())
        yield from (module for module in self._modules if module in replaced or self._has_hooks(module))

    def _has_hooks(self, module: nn.Module) -> bool:
        return any(
            not _is_idle(hook) and not (isinstance(hook, HookObserver) and id(hooks) in self._observed)
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )


def is_capturing() -> bool:
    """Whether transformers captures outputs of modules in this thread's call."""
    return bool(output_capturing._active_collector.get())


def _is_idle(hook: object) -> bool:
    """Whether it is one of the hooks that transformers captures outputs with, and this thread's call captures nothing.

    They are installed by the first call for hidden states, attentions or router logits, and stay.
    """
    return getattr(hook, "__module__", None) == output_capturing.__name__ and not is_capturing()
