"""The import of torch and transformers, without torch's compiler and its distributed tensors.

transformers marks functions for the compiler where it defines them, which imports a third of all modules. The command
line compiles nothing and has one process.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from offload_moe.errors import BudgetError

from .failures import NO_MEMORY

LEAST_ADDRESSES = 640 << 20  # bytes: with less, libraries end the process while they are loaded
COMPILER, ATTRIBUTE = "torch._dynamo", "_dynamo"
MARKS = ("allow_in_graph", "assume_constant_result", "disable")  # decorators, which only the compiler reads


@contextmanager
def importing() -> Iterator[None]:
    """Import libraries inside. What is left out can be imported behind it. Raises: BudgetError: no room for them."""
    _check_addresses()
    with _without_garbage_collection():
        import torch

        with _without_compiler(torch), _without_other_processes(torch.distributed):
            yield


def _check_addresses() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESSES:
        raise BudgetError(
            f"There is no memory left to load libraries: this process may have {limit >> 20} MiB of addresses, and "
            f"they take {LEAST_ADDRESSES >> 20}. {NO_MEMORY}"
        )


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Imports create hundreds of thousands of permanent objects; collecting among them takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _without_compiler(torch: Any) -> Iterator[None]:
    if COMPILER in sys.modules:
        yield
        return
    vars(torch)[ATTRIBUTE] = sys.modules[COMPILER] = _Marks(torch)
    try:
        yield
    finally:
        _remove(torch)


@contextmanager
def _without_other_processes(distributed: Any) -> Iterator[None]:
    """transformers looks once whether there may be some, and then imports what they share."""
    before = distributed.is_available
    distributed.is_available = lambda: False
    try:
        yield
    finally:
        distributed.is_available = before


class _Marks(ModuleType):
    """Stands in for the compiler, whose other files can be imported; any other use of it imports the compiler."""

    def __init__(self, torch: Any) -> None:
        super().__init__(COMPILER)
        self.__spec__ = find_spec(COMPILER)
        self.__path__ = list(self.__spec__.submodule_search_locations or ()) if self.__spec__ is not None else []
        self._torch = torch
        for name in MARKS:
            setattr(self, name, _unchanged)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _remove(self._torch)
        return getattr(import_module(COMPILER), name)


def _unchanged(function: Any = None, *_: object, **__: object) -> Any:
    return function if callable(function) else lambda marked: marked


def _remove(torch: Any) -> None:
    """Remove the stand-in, unless the compiler itself has taken its place."""
    if isinstance(sys.modules.get(COMPILER), _Marks):
        del sys.modules[COMPILER], vars(torch)[ATTRIBUTE]
