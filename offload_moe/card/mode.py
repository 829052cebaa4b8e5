"""Which way a pass goes: queued, where the card fetches what it misses, or stepwise, where the CPU computes it.

Both give the same bits, so the seconds decide that a token has taken lately.
"""

from typing import Literal

Mode = Literal["auto", "queued", "stepwise"]
QUEUED, STEPWISE = 0, 1
# Of the way that is tried. Stepwise passes leave the slots as they are, which queued ones between them renew.
TRIAL_EVERY = (16, 144)  # passes between trials; the fewer where the present way is slower than the other one was
TRIAL_PASSES = (2, 1)  # of which the last is measured
WEIGHT, TRIAL_WEIGHT = 0.3, 0.7  # of the last pass in a mean


class ModeChoice:
    """Queued or stepwise passes.

    mode: "auto" measures, and decides at the end of each trial: the first passes behind a prompt are slower.
    """

    def __init__(self, mode: Mode = "auto") -> None:
        self.mode: Mode = mode
        self.seconds: list[float | None] = [None, None]  # per row, of both ways, in passes that missed something
        self._num_missed = 0
        self._better = QUEUED
        self._trial, self._num_left = QUEUED, TRIAL_PASSES[QUEUED]  # the way that is tried, and passes that are left
        self._since_trial = 0
        self.now = QUEUED

    def choose(self) -> bool:
        """Whether the next pass goes stepwise."""
        self.now = self._chosen()
        return self.now == STEPWISE

    def measured(self, seconds: float, num_rows: int, *, num_missed: int, is_stepwise: bool) -> None:
        """What a pass took, and how many experts it missed."""
        self._num_missed = num_missed
        if not num_missed:
            return
        is_trial = self._num_left > 0 and is_stepwise == self._trial
        self._num_left -= is_trial
        if is_trial and self._num_left:
            return
        before, now = self.seconds[is_stepwise], seconds / num_rows
        weight = TRIAL_WEIGHT if is_trial else WEIGHT
        self.seconds[is_stepwise] = now if before is None else before + weight * (now - before)
        if is_trial:
            self._decide()
        elif not self._num_left:
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
        other = 1 - self._better
        most_passes = min(TRIAL_EVERY) if self._is_slower else TRIAL_EVERY[other]
        if not self._num_left and self._since_trial >= most_passes:
            self._begin_trial(other)
        return self._trial if self._num_left else self._better

    @property
    def _is_slower(self) -> bool:
        """Whether the present way takes longer than the other one did."""
        now, other = self.seconds[self._better], self.seconds[1 - self._better]
        return now is not None and other is not None and now > other

    def _decide(self) -> None:
        queued, stepwise = self.seconds
        if queued is None or stepwise is None:
            self._begin_trial(QUEUED if queued is None else STEPWISE)
        else:
            self._better = QUEUED if queued <= stepwise else STEPWISE

    def _begin_trial(self, way: int) -> None:
        self._trial, self._num_left, self._since_trial = way, TRIAL_PASSES[way], 0
