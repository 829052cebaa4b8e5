"""Which way a pass goes: queued, where the card fetches what it misses, or stepwise, where the CPU computes it.

Both give the same bits, so the seconds decide that a token has taken lately.
"""

from typing import Literal

Mode = Literal["auto", "queued", "stepwise"]
QUEUED, STEPWISE = 0, 1
TRIAL_EVERY = 48  # passes, after which the slower way is tried again
WEIGHT = 0.2  # of the last pass in a mean


class ModeChoice:
    """mode: "auto" measures."""

    def __init__(self, mode: Mode = "auto") -> None:
        self.mode: Mode = mode
        self.seconds: list[float | None] = [None, None]  # per row, of both ways, in passes that missed something
        self._num_missed = 0
        self._since_trial = 0
        self.now = QUEUED

    def choose(self) -> bool:
        """Whether the next pass goes stepwise."""
        self.now = self._chosen()
        return self.now == STEPWISE

    def measured(self, seconds: float, num_rows: int, *, num_missed: int, is_stepwise: bool) -> None:
        """What a pass took, and how many experts it missed."""
        self._num_missed = num_missed
        if num_missed:
            before, now = self.seconds[is_stepwise], seconds / num_rows
            self.seconds[is_stepwise] = now if before is None else before + WEIGHT * (now - before)
            self._since_trial += 1

    @property
    def name(self) -> str:
        """Of the way that the last pass went."""
        return "stepwise" if self.now == STEPWISE else "queued"

    def _chosen(self) -> int:
        if self.mode != "auto":
            return STEPWISE if self.mode == "stepwise" else QUEUED
        if not self._num_missed:
            return QUEUED
        queued, stepwise = self.seconds
        if queued is None or stepwise is None:
            return QUEUED if queued is None else STEPWISE
        better = QUEUED if queued <= stepwise else STEPWISE
        if self._since_trial >= TRIAL_EVERY:
            self._since_trial = 0
            return 1 - better
        return better
