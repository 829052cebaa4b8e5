"""Ctrl-C at a moment of our choosing: an exception between any two operations would leave them half done."""

import signal
import threading
from types import TracebackType
from typing import Self


class HeldInterrupt:
    """As a context: an interrupt raises KeyboardInterrupt at its end, and only a second one at once.

    It changes nothing where interrupts do not raise: in other threads than the main one, or under a user's handler.
    """

    def __init__(self) -> None:
        self.is_waiting = False
        self._holds = False

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        self._holds = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._holds:
            signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.is_waiting and kind is not KeyboardInterrupt:
            raise KeyboardInterrupt

    def _hold(self, number: int, frame: object) -> None:
        if self.is_waiting:
            raise KeyboardInterrupt
        self.is_waiting = True
