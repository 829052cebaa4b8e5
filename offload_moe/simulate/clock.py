"""Virtual time: events in order, and a condition whose wait runs them. One thread, no sleeping."""

import heapq
import threading
from collections.abc import Callable
from itertools import count

Callback = Callable[[], None]


class VirtualClock:
    """Seconds since the simulation began. Callbacks run at their time; they may schedule others, not advance time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callback]] = []
        self._order = count()  # events of the same time run in the order they were scheduled

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, callback: Callback) -> None:
        heapq.heappush(self._events, (max(when, self.now), next(self._order), callback))

    def after(self, delay_s: float, callback: Callback) -> None:
        self.at(self.now + delay_s, callback)

    def advance(self, seconds: float) -> None:
        """Advance the time, and run the events that are due."""
        self.advance_to(self.now + seconds)

    def advance_to(self, when: float) -> None:
        while self._events and self._events[0][0] <= when:
            self.run_next()
        self.now = max(self.now, when)

    def run_next(self) -> bool:
        """Advance to the next event. False when there is none."""
        if not self._events:
            return False
        when, _, callback = heapq.heappop(self._events)
        self.now = when
        callback()
        return True


class VirtualCondition(threading.Condition):
    """A scheduler's condition. With one thread its lock does nothing."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock
        self.listeners: list[Callback] = []  # callbacks that run after the current one when the condition is notified

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *exception: object) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the next event; without one, until the timeout, which the caller reports."""
        if not self._clock.run_next():
            self._clock.advance(timeout or 0.0)
        return True

    def notify_all(self) -> None:
        for listener in self.listeners:
            self._clock.after(0.0, listener)
