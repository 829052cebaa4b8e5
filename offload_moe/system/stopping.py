"""A forward that may be left in its middle: between decoder layers, and between waves of experts."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_thread = threading.local()


class StoppedInForward(Exception):
    """A request was stopped within a step, or while it waited for its turn."""


@contextmanager
def stoppable(is_stopping: Callable[[], bool]) -> Iterator[None]:
    """What this thread computes meanwhile ends at the next `leave_if_stopped` once `is_stopping`."""
    before = getattr(_thread, "is_stopping", None)
    _thread.is_stopping = is_stopping
    try:
        yield
    finally:
        _thread.is_stopping = before


def leave_if_stopped() -> None:
    """Raises StoppedInForward in a thread whose forward is to end."""
    is_stopping = getattr(_thread, "is_stopping", None)
    if is_stopping is not None and is_stopping():
        raise StoppedInForward
