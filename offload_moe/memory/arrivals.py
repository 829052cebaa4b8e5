"""A condition that a reader's completions signal, without a thread of Python between disk and waiter."""

import threading
import weakref
from collections.abc import Callable

from offload_moe.memory.reader import Waitable


class ArrivalCondition(threading.Condition):
    """Blocks a waiting thread in the reader, with the GIL released; afterwards the thread drains the completions.

    Every wait returns within `native.reads.POLL_S`, so that signals are handled and a closed model is noticed.
    """

    def __init__(self, reader: Waitable, drain: "weakref.WeakMethod[Callable[[], None]]") -> None:
        """drain: enters completions; called with the lock held. Weak, because its object holds the condition."""
        super().__init__(threading.RLock())
        self._reader, self._drain = reader, drain
        self._num_waiting = 0  # guarded by the lock

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a read has ended, or for `notify_all`, but not longer than a moment (lock held)."""
        reader, num_wakes = self._reader, self._reader.num_wakes
        self._num_waiting += 1
        held = self._release_save()  # type: ignore[attr-defined]
        try:
            reader.wait(num_wakes, threading.TIMEOUT_MAX if timeout is None else timeout)
        finally:
            self._acquire_restore(held)  # type: ignore[attr-defined]
            self._num_waiting -= 1
        drain = self._drain()
        if drain is not None:
            drain()
        return True

    def notify(self, n: int = 1) -> None:
        """Wake all waiting threads (lock held)."""
        if self._num_waiting:
            self._reader.wake()

    def notify_all(self) -> None:
        """Wake all waiting threads (lock held)."""
        self.notify()
