"""VRAM that other programs take while a model is loaded, and what of it the expert slots have to make up for."""

import time
from collections.abc import Callable
from contextlib import suppress

from offload_moe.errors import BudgetError
from offload_moe.memory.copier import DeviceMemory

KEPT_BYTES = 256 << 20  # that stay free beside all that was planned; half of what is free there if that is less
SWAY_BYTES = 128 << 20  # given up beyond what is missing, and free beyond that before anything comes back
LOOK_EVERY_S = 0.25
BACK_AFTER_S = 10.0


class OtherPrograms:
    """What of the planned memory they have taken. For one thread at a time.

    num_bytes: that the slots give up. They do at once, and have them back once the memory was free for some seconds.
    Only what the process cannot have any more counts: its own keys, values and activations were planned.

    What the process itself takes past torch's allocator looks like another program's: code and local memory of kernels
    at their first launch, executable graphs. Nearly all of that comes with the first answer. So until `settle` only
    memory that was planned is kept, and from then on what is free beside it by then. What this cannot distinguish: what
    other programs take beside the plan during the first answer, which counts as the process's own and is missing only
    from that reserve; and what the process takes later (graphs for more rows, a kernel's first launch), which counts as
    other programs' where the reserve does not hold it. The slots have to make room for it in either case.
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
        self._needed = min(memory.available_bytes, memory.used_bytes + planned_bytes)
        self._most_kept, self._most_sway = kept_bytes, sway_bytes
        self._set_reserve(memory.available_bytes)
        self._kept, self._is_settled = 0, False
        self._next_look_s = clock()
        self._free_since_s: float | None = None
        self.num_bytes = 0

    def settle(self) -> None:
        """Behind an answer. The first that other programs have taken nothing from ends the process's own growth."""
        if self._is_settled or self.num_bytes:
            return
        with suppress(BudgetError):
            self._set_reserve(self._measure().available_bytes)
            self._is_settled = True

    def put_off(self, num_bytes: int) -> None:
        """Slots could not come back: they give up so much as before, until it was free for some seconds again."""
        self.num_bytes, self._free_since_s = num_bytes, None

    def look(self, *, now: bool) -> bool:
        """Measure, if it is time or `now`. Returns whether `num_bytes` has changed."""
        time_s, before = self._clock(), self.num_bytes
        if not now and time_s < self._next_look_s:
            return False
        self._next_look_s = time_s + LOOK_EVERY_S
        try:
            missing = self._needed + self._kept - self._measure().available_bytes
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

    def _set_reserve(self, available_bytes: int) -> None:
        self._kept = min(self._most_kept, max(0, available_bytes - self._needed) // 2)
        self._sway = min(self._most_sway, self._kept // 2)
