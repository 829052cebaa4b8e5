"""Recent costs: seconds per record on the link, measured while everything else runs, too."""

import threading
import time
from collections.abc import Sequence

NEWEST_SHARE = 0.2  # of the newest measurement in the running estimate


class RunningCost:
    """A running estimate of the seconds of one piece of work; None before the first measurement."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def note(self, seconds: float) -> None:
        """Add a measurement."""
        self.seconds = seconds if self.seconds is None else self.seconds + NEWEST_SHARE * (seconds - self.seconds)


class LinkPace:
    """Measures copies, which queue: one takes the time since its beginning or since the last arrival."""

    def __init__(self) -> None:
        self.cost = RunningCost()
        self.last_arrival = self.last_demanded_arrival = 0.0  # time.perf_counter()
        self._began: list[float] = []
        self._lock = threading.Lock()

    def begin(self) -> float:
        """Note that a copy is issued now. Returns its time, for `end` or `fail`."""
        with self._lock:
            began = time.perf_counter()
            self._began.append(began)
            return began

    def end(self, began: Sequence[float], *, are_demanded: bool = True) -> None:
        """Note that these copies have arrived one after the other, the last of them now."""
        if not began:
            return
        with self._lock:
            now = time.perf_counter()
            each = (now - max(min(began), self.last_arrival)) / len(began)
            for one in began:
                self._began.remove(one)
                self.cost.note(each)
            self.last_arrival = now
            if are_demanded:
                self.last_demanded_arrival = now

    def fail(self, began: float) -> None:
        """Note that this copy will not arrive."""
        with self._lock:
            self._began.remove(began)

    def busy_s(self) -> float:
        """Seconds until the copies under way are expected to have arrived; 0 when the link is idle."""
        with self._lock:
            if not self._began:
                return 0.0
            since = time.perf_counter() - max(self._began[0], self.last_arrival)
            return max(1e-6, len(self._began) * (self.cost.seconds or 0.0) - since)
