"""Whether a model may be used: it is open until it is closed, the process forks, or the interpreter exits.

Experts are reached only within a pass, `with lifecycle:`. Closing lets no pass begin, waits for those in flight, and
releases what they used. A model that is dropped instead is released piece by piece, by the finalizers of `finalize`.
"""

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self

from offload_moe.errors import ModelClosed

CLOSED = "This model is closed. Load it again."
FORKED = (
    "This model was loaded before this process was forked: its threads and its experts stayed in the parent. "
    "Load it in this process, or start the process with `spawn`."
)
EXITING = "The interpreter is exiting."
EXIT_LIMIT_S = 5.0  # a thread that is stuck in a dead disk must not keep the process from ending
_STEP_S = 0.1  # a wait without an end cannot be interrupted on Windows

_lifecycles: "weakref.WeakSet[Lifecycle]" = weakref.WeakSet()
_is_forked_with_torch = False


class Lifecycle:
    """Of one model. As a context: one pass. Safe to use from several threads, and from signal handlers.

    A pass costs no lock: every thread counts its own, and looks whether the model is open after it has counted.
    """

    def __init__(self) -> None:
        self._passes: dict[int, int] = {}  # by thread
        self._ended: str | None = None  # why no pass begins any more
        self._release: Callable[[], object] | None = None
        self._changed = threading.Condition()
        self._releasing = threading.RLock()
        _lifecycles.add(self)

    @property
    def is_open(self) -> bool:
        return self._ended is None

    def check(self) -> None:
        """Not within a pass. Raises: ModelClosed. A daemon thread does not return while the interpreter exits."""
        if self._ended is not None:
            self._refuse(self._ended)

    def begin_forward(self) -> None:
        """As `check`. This thread is in no pass now: an interrupt just before `__exit__` may have left one behind."""
        self._passes.pop(threading.get_ident(), None)
        self.check()

    def check_waiting(self) -> None:
        """The same within a pass, which may hold locks. Raises: ModelClosed."""
        if self._ended is not None:
            raise ModelClosed(self._ended)

    def __enter__(self) -> Self:
        thread = threading.get_ident()
        self._passes[thread] = self._passes.get(thread, 0) + 1
        if self._ended is not None:
            self._leave(thread)
            self._refuse(self._ended)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(threading.get_ident())
        if self._ended is not None:
            self._stop_at_exit()

    def end(self, release: Callable[[], object]) -> None:
        """Close. Passes of other threads are waited for: they end at their next layer, or where they wait for experts.

        release: frees what passes use; called once none is in flight, also where that is after this call because it
        comes from within a pass, as from a signal handler. It may be called again, and does nothing then.
        """
        if self._ended == FORKED:
            return
        with self._changed:
            self._ended = self._ended or CLOSED
            self._release = release
            while self._passes and self._ended != EXITING and threading.get_ident() not in self._passes:
                self._changed.wait(_STEP_S)
        self._release_when_idle()

    def _leave(self, thread: int) -> None:
        depth = self._passes.get(thread, 1) - 1
        if depth:
            self._passes[thread] = depth
        else:
            self._passes.pop(thread, None)
        if self._ended is not None:
            with self._changed:
                self._changed.notify_all()
            self._release_when_idle()

    def _release_when_idle(self) -> None:
        with self._releasing:
            release = self._release
            if release is not None and not self._passes:
                release()
                self._release = None

    def _refuse(self, why: str) -> NoReturn:
        self._stop_at_exit()
        raise ModelClosed(why)

    def _stop_at_exit(self) -> None:
        """A daemon thread that the interpreter stops inside of torch aborts the process: it stops here instead."""
        if self._ended == EXITING and threading.current_thread() is not threading.main_thread():
            threading.Event().wait()

    def _exit(self, limit_s: float) -> None:
        if self._ended == FORKED:
            return  # the lock may have been held by a thread of the parent
        with self._changed:
            self._ended = self._ended or EXITING
            self._changed.wait_for(lambda: not self._passes, limit_s)

    def _fork(self) -> None:
        self._ended = FORKED


def finalize(owner: object, release: Callable[..., object], *arguments: Any) -> "weakref.finalize[..., Any]":
    """Call `release` once `owner` is dropped, or at exit; not in a process that was forked since.

    The arguments must not lead back to the owner.
    """
    return weakref.finalize(owner, _release_here, os.getpid(), release, arguments)


def was_forked_with_torch() -> bool:
    """Whether this process was forked from one that had imported torch."""
    return _is_forked_with_torch


def _release_here(process: int, release: Callable[..., object], arguments: tuple[Any, ...]) -> object:
    return release(*arguments) if process == os.getpid() else None


def _after_fork_in_child() -> None:
    global _is_forked_with_torch
    _is_forked_with_torch = "torch" in sys.modules
    for lifecycle in list(_lifecycles):
        lifecycle._fork()


def _at_exit() -> None:
    for lifecycle in list(_lifecycles):
        lifecycle._exit(EXIT_LIMIT_S)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
weakref.finalize(Lifecycle, bool).atexit = True  # the first finalizer registers them all: they run after what follows
atexit.register(_at_exit)
