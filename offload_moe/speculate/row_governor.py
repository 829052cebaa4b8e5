"""How many answers share a pass, from what passes of so many rows cost.

A pass of T rows gives T tokens and takes `PassCosts.ratio(T)` times as long as one of one row.
"""

from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.balance import Balance
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.governor import CALIBRATE_AFTER, LEAST_GAIN


class RowGovernor:
    """Of one model. Rows of several answers share fewer experts than guesses of one, so their costs are their own."""

    def __init__(self) -> None:
        self._costs = PassCosts()
        self._balance = Balance()
        self._since_plain = 0

    def choose(self, most: int) -> int:
        """How many rows pay best, `most` or fewer; 1 where answers are to be computed one after another."""
        plain_s = self._costs.plain_s
        if not plain_s or self._since_plain >= CALIBRATE_AFTER or self._balance.is_overdrawn(plain_s):
            return 1
        best = max(range(1, min(most, MAX_ROWS) + 1), key=self.rate)
        return best if self.rate(best) >= LEAST_GAIN else 1

    def rate(self, num_rows: int) -> float:
        """Tokens per time of a plain pass."""
        return num_rows / self._costs.ratio(num_rows)

    def note(self, num_rows: int, seconds: float, num_misses: int) -> None:
        """A pass was computed, without guesses."""
        self._costs.note(num_rows, seconds, num_misses)
        if num_rows == 1:
            self._balance.note_plain(seconds)
            self._since_plain = 0
        else:
            plain_s = self._costs.plain_s
            self._balance.note_rows(num_rows * plain_s - seconds, seconds, plain_s)
            self._since_plain += 1
