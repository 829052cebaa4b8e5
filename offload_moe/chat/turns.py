"""Turns: requests of one model compute one after another, first come, first served. A turn is one step of a request."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from offload_moe.families.text_model import TextModel
from offload_moe.system.stopping import StoppedInForward

# A wait without a timeout cannot be interrupted on Windows.
POLL_S = 0.1


class Turns:
    """A lock that is acquired in the order of the calls."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()  # the first one computes

    @contextmanager
    def turn(self, is_stopping: Callable[[], bool]) -> Iterator[None]:
        """Wait for the turn and hold it. Raises: StoppedInForward when `is_stopping` during the wait."""
        ticket = object()
        try:
            with self._changed:
                self._queue.append(ticket)
                while self._queue[0] is not ticket:
                    if is_stopping():
                        raise StoppedInForward
                    self._changed.wait(POLL_S)
            yield
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()


_TURNS: WeakKeyDictionary[TextModel, Turns] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TURNS.clear)  # computing threads exist only in the parent


def turns_of(hf: TextModel) -> Turns:
    return _TURNS.setdefault(hf, Turns())
