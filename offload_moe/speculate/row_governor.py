"""How many answers share a pass, from what passes of so many rows cost.

A pass of T rows gives T tokens and takes `PassCosts.ratio(T)` times as long as one of one row.
"""

from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.balance import Balance
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.governor import CALIBRATE_AFTER, LEAST_GAIN

CAUTION = 0.5  # answers in turn evict each other's experts for longer than a pass shows


class RowGovernor:
    """Of one model. Rows of several answers share fewer experts than guesses of one, so their costs are their own."""

    def __init__(self) -> None:
        self._costs = PassCosts(CAUTION)
        self._balance = Balance()
        self._since_plain = 0

    def choose(self, most: int) -> int:
        """How many rows pay best, `most` or fewer; 1 where answers are to be computed one after another."""
        if not self._costs.plain_s or self._since_plain >= CALIBRATE_AFTER or not self._may_share:
            return 1
        best = max(range(1, min(most, MAX_ROWS) + 1), key=self.rate)
        return best if self.rate(best) >= LEAST_GAIN else 1

    @property
    def pays(self) -> bool:
        """Whether several rows give more tokens per time than passes one after another, as far as that is known."""
        return self._may_share and max(map(self.rate, range(2, MAX_ROWS + 1))) >= LEAST_GAIN

    @property
    def is_measuring(self) -> bool:
        """Whether passes of one row are needed: nothing is shared or guessed meanwhile."""
        return self._costs.is_stale

    @property
    def _may_share(self) -> bool:
        return not (self.is_measuring or self._balance.left < 0)

    def rate(self, num_rows: int) -> float:
        """Tokens per time of a plain pass."""
        return num_rows / self._costs.ratio(num_rows)

    def note(self, num_rows: int, seconds: float, num_misses: int) -> None:
        """A pass was computed, without guesses."""
        if num_rows > 1:  # what seems faster than a plain pass is beside plain ones that waited for experts
            seconds = max(seconds, self._costs.plain_s)
        self._balance.note(num_rows, self._costs.note(num_rows, seconds, num_misses))
        self._since_plain = 0 if num_rows == 1 else self._since_plain + 1
