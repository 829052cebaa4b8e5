"""What a pass of several rows costs, measured as a multiple of a pass of one.

Where experts are missing, rows leave others in the cache than their sequence needs next, and the passes behind them
miss more. So a pass of one row counts as a usual one only behind several others, or where nothing is ever missing;
else only if it was faster, and less.
"""

FORGET_PLAIN, FORGET_ROWS = 0.2, 0.3  # weight of the newest measurement
RELAX = 0.005  # of the way back to the expectation, per plain pass: a single slow pass must not count for all time
EXPECTED_PER_ROW = 0.12
MOST_LATE = 4.0  # a plain pass counts as at most so many times the usual one
FEW_MISSES = 0.05  # per pass: as good as none
SETTLED_AFTER = 16  # passes of one row
ENOUGH = 8  # settled ones, after which the usual pass is known
# Passes since that was so: few at first, for what was measured may be a beginning; twice as many each time.
STALE_AFTER = (32, 512)


class PassCosts:
    """Of one model: seconds, and expert misses, of passes by their number of rows."""

    def __init__(self, caution: float = 0.05) -> None:
        """caution: weight of a pass of one row that does not count as usual and was faster; doubt goes against rows."""
        self._caution = caution
        self.plain_s = 0.0  # of one row; 0 before the first
        self.plain_misses = 0.0
        self._ratios: dict[int, float] = {}
        self._since_rows = self._num_settled = 0  # passes of one row in a row, and those of them that count
        self._stale_after, self._most_after = STALE_AFTER
        self._since_usual = self._stale_after  # the first passes may read all their experts

    @property
    def is_stale(self) -> bool:
        """Whether passes of one row are to be measured, as many as it takes."""
        return self._since_usual >= self._stale_after

    def note(self, num_rows: int, seconds: float, num_misses: int) -> float:
        """A pass was computed. Returns how many usual passes of one row took as long."""
        if num_rows == 1:
            return self._note_alone(seconds, num_misses)
        self._since_rows = self._num_settled = 0
        self._since_usual += 1
        if not self.plain_s:
            return 1.0
        self._note_rows(num_rows, seconds)
        return seconds / self.plain_s

    def ratio(self, num_rows: int) -> float:
        """Seconds of a pass over those of a pass of one row; by the nearest that was measured, or as expected."""
        if num_rows == 1:
            return 1.0
        nearest = min(self._ratios, key=lambda rows: abs(rows - num_rows), default=None)
        if nearest is None:
            return _expected(num_rows)
        return 1.0 + (self._ratios[nearest] - 1.0) * (num_rows - 1) / (nearest - 1)

    def _note_alone(self, seconds: float, num_misses: int) -> float:
        has_misses = num_misses > 0 or self.plain_misses > FEW_MISSES
        self._since_rows += 1
        is_settled = self._since_rows > SETTLED_AFTER or not has_misses
        if not is_settled and self._ratios:
            self._since_usual += 1
            if seconds < self.plain_s:
                self.plain_s += self._caution * (seconds - self.plain_s)
            return min(seconds / self.plain_s, MOST_LATE)
        self._note_plain(seconds, num_misses)
        self._num_settled = self._num_settled + 1 if is_settled else 0
        is_usual = not has_misses or self._num_settled >= ENOUGH
        if is_usual and self.is_stale and self._ratios:
            self._stale_after = min(2 * self._stale_after, self._most_after)
        self._since_usual = 0 if is_usual else self._since_usual + 1
        return 1.0

    def _note_plain(self, seconds: float, num_misses: int) -> None:
        if not self.plain_s:
            self.plain_s, self.plain_misses = seconds, num_misses
        self.plain_s += FORGET_PLAIN * (min(seconds, MOST_LATE * self.plain_s) - self.plain_s)
        self.plain_misses += FORGET_PLAIN * (num_misses - self.plain_misses)
        for num_rows, ratio in self._ratios.items():
            self._ratios[num_rows] = ratio + RELAX * (_expected(num_rows) - ratio)

    def _note_rows(self, num_rows: int, seconds: float) -> None:
        ratio = min(seconds / self.plain_s, 2.0 * num_rows)
        before = self._ratios.get(num_rows, ratio)
        self._ratios[num_rows] = before + FORGET_ROWS * (ratio - before)


def _expected(num_rows: int) -> float:
    return 1.0 + EXPECTED_PER_ROW * (num_rows - 1)
