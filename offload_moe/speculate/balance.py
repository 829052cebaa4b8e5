"""What passes of several rows have won and lost against passes of one."""

MOST_LOST = 0.015  # of all time so far
CREDIT_PASSES = 1.0  # so many passes' time may be lost before anything was won, and won time covers no more than this


class Balance:
    """Of one way to fill passes: once it has lost too much, it has to wait."""

    def __init__(self) -> None:
        self._won_s = 0.0
        self._spent_s = 0.0

    def note_plain(self, seconds: float) -> None:
        """A pass of one row."""
        self._spent_s += seconds

    def note_rows(self, saved_s: float, seconds: float, plain_s: float) -> None:
        """A pass of several rows, which saved so much against plain ones, each of which takes `plain_s`."""
        self._spent_s += seconds
        self._won_s = min(self._won_s + saved_s, CREDIT_PASSES * plain_s)

    def is_overdrawn(self, plain_s: float) -> bool:
        return self._won_s < -MOST_LOST * self._spent_s - CREDIT_PASSES * plain_s
