"""VRAM that other programs take while a model is loaded, and what of it the expert slots have to make up for."""

import time
from collections.abc import Callable

from offload_moe.errors import BudgetError
from offload_moe.memory.copier import DeviceMemory

KEPT_BYTES = 256 << 20  # that stay free beside all that was planned; half of what was free at load if that is less
SWAY_BYTES = 128 << 20  # given up beyond what is missing, and free beyond that before anything comes back
LOOK_EVERY_S = 0.25
BACK_AFTER_S = 10.0


class OtherPrograms:
    """What of the planned memory they have taken. For one thread at a time.

    num_bytes: that the slots give up. They do at once, and have them back once the memory was free for some seconds.
    Only what the process cannot have any more counts: its own keys, values and activations were planned.
    """

    def __init__(
        self,
        measure: Callable[[], DeviceMemory],
        planned_bytes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        kept_bytes: int = KEPT_BYTES,
        sway_bytes: int = SWAY_BYTES,
    ) -> None:
        """At load. planned_bytes: that the process has not taken yet. Raises: BudgetError where nothing is reported."""
        self._measure, self._clock = measure, clock
        memory = measure()
        unplanned = max(0, memory.available_bytes - memory.used_bytes - planned_bytes)
        kept = min(kept_bytes, unplanned // 2)
        self._sway = min(sway_bytes, kept // 2)
        self._least_available = memory.available_bytes - unplanned + kept
        self._next_look_s = clock()
        self._free_since_s: float | None = None
        self.num_bytes = 0

    def look(self, *, now: bool) -> bool:
        """Measure, if it is time or `now`. Returns whether `num_bytes` has changed."""
        time_s, before = self._clock(), self.num_bytes
        if not now and time_s < self._next_look_s:
            return False
        self._next_look_s = time_s + LOOK_EVERY_S
        try:
            missing = self._least_available - self._measure().available_bytes
        except BudgetError:  # of a lost card, which the next pass names
            return False
        if missing > before:
            self.num_bytes = missing + self._sway
        if not before or missing + 2 * self._sway > before:
            self._free_since_s = None
        elif self._free_since_s is None:
            self._free_since_s = time_s
        elif time_s - self._free_since_s >= BACK_AFTER_S:
            self._free_since_s, self.num_bytes = None, max(0, missing + self._sway)
        return self.num_bytes != before
