"""The life of a model: it is open until it is closed, the process forks, or the interpreter exits.

Experts are used only within a pass, `with lifecycle:`. Closing refuses new passes, waits for passes in flight, and
releases the model's resources. A model that is dropped instead is released by the finalizers of `finalize`.
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
EXIT_LIMIT_S = 5.0  # a thread that is blocked by a dead disk must not keep the process from ending
_STEP_S = 0.1  # a wait without an end cannot be interrupted on Windows

_lifecycles: "weakref.WeakSet[Lifecycle]" = weakref.WeakSet()
_is_forked_with_torch = False


class Lifecycle:
    """The life of one model; as a context manager, one pass. Safe for several threads and for signal handlers.

    A pass takes no lock: every thread counts its own passes, and checks that the model is open after counting.
    """

    def __init__(self) -> None:
        self._passes: dict[int, int] = {}  # passes by thread
        self._ended: str | None = None  # the reason why new passes are refused
        self._fault: Exception | None = None
        self._release: Callable[[], object] | None = None
        self._changed = threading.Condition()
        self._releasing = threading.RLock()
        _lifecycles.add(self)

    @property
    def is_open(self) -> bool:
        return self._ended is None

    def check(self) -> None:
        """Check outside a pass. Raises: ModelClosed, and the error of `fail`.

        A daemon thread does not return while the interpreter exits.
        """
        if self._ended is not None:
            self._refuse(self._ended)
        self._check_fault()

    def begin_forward(self) -> None:
        """As `check`, and reset this thread's count, which an interrupt before `__exit__` may have left too high."""
        self._passes.pop(threading.get_ident(), None)
        self.check()

    def check_waiting(self) -> None:
        """Check within a pass, which may hold locks. Raises: ModelClosed, and the error of `fail`."""
        if self._ended is not None:
            raise ModelClosed(self._ended)
        self._check_fault()

    def fail(self, error: Exception) -> None:
        """End passes with this error at their next check, and refuse new ones until the model is closed."""
        self._fault = error

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
        """Close the model and wait for passes of other threads, which end at their next layer or wait for experts.

        release: frees the resources of passes; called once no pass is in flight. If `close` is called within a pass, as
        by a signal handler, that is after its return. A second call of `close` has no effect.
        """
        if self._ended == FORKED:
            return
        with self._changed:
            self._ended = self._ended or CLOSED
            self._release = release
            while self._passes and self._ended != EXITING and threading.get_ident() not in self._passes:
                self._changed.wait(_STEP_S)
        self._release_when_idle()

    def _check_fault(self) -> None:
        if self._fault is not None:
            raise self._fault.with_traceback(None)

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
        """Block a daemon thread at exit: if the interpreter stopped it inside torch, the process would abort."""
        if self._ended == EXITING and threading.current_thread() is not threading.main_thread():
            threading.Event().wait()

    def _exit(self, limit_s: float) -> None:
        if self._ended == FORKED:
            return  # a thread of the parent may have held the lock
        with self._changed:
            self._ended = self._ended or EXITING
            self._changed.wait_for(lambda: not self._passes, limit_s)

    def _fork(self) -> None:
        self._ended = FORKED


def has_loaded() -> bool:
    """Whether this process has a model, or one that was dropped and is not freed yet."""
    return len(_lifecycles) > 0


def finalize(owner: object, release: Callable[..., object], *arguments: Any) -> "weakref.finalize[..., Any]":
    """Call `release` once `owner` is dropped, or at exit, but never in a process that was forked later.

    The arguments must not refer to the owner.
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
# The first finalizer registers the exit hook of all finalizers; hooks run in reverse order, so after `_at_exit`.
weakref.finalize(Lifecycle, bool).atexit = True
atexit.register(_at_exit)
