"""What a pass of several rows costs, measured as a multiple of a pass of one."""

FORGET_PLAIN, FORGET_ROWS = 0.2, 0.3  # weight of the newest measurement
RELAX = 0.005  # of the way back to the expectation, per plain pass: a single slow pass must not count for all time
EXPECTED_PER_ROW = 0.12
MOST_LATE = 4.0  # a plain pass counts as at most so many times the usual one


class PassCosts:
    """Of one model: seconds, and expert misses, of passes by their number of rows."""

    def __init__(self) -> None:
        self.plain_s = 0.0  # of one row; 0 before the first
        self.plain_misses = 0.0
        self._ratios: dict[int, float] = {}

    def note(self, num_rows: int, seconds: float, num_misses: int) -> None:
        """A pass was computed."""
        if num_rows == 1:
            self._note_plain(seconds, num_misses)
        elif self.plain_s:
            ratio = min(seconds / self.plain_s, 2.0 * num_rows)
            before = self._ratios.get(num_rows, ratio)
            self._ratios[num_rows] = before + FORGET_ROWS * (ratio - before)

    def ratio(self, num_rows: int) -> float:
        """Seconds of a pass over those of a pass of one row; by the nearest that was measured, or as expected."""
        if num_rows == 1:
            return 1.0
        nearest = min(self._ratios, key=lambda rows: abs(rows - num_rows), default=None)
        if nearest is None:
            return _expected(num_rows)
        return 1.0 + (self._ratios[nearest] - 1.0) * (num_rows - 1) / (nearest - 1)

    def _note_plain(self, seconds: float, num_misses: int) -> None:
        if not self.plain_s:
            self.plain_s, self.plain_misses = seconds, num_misses
        self.plain_s += FORGET_PLAIN * (min(seconds, MOST_LATE * self.plain_s) - self.plain_s)
        self.plain_misses += FORGET_PLAIN * (num_misses - self.plain_misses)
        for num_rows, ratio in self._ratios.items():
            self._ratios[num_rows] = ratio + RELAX * (_expected(num_rows) - ratio)


def _expected(num_rows: int) -> float:
    return 1.0 + EXPECTED_PER_ROW * (num_rows - 1)
