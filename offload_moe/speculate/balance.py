"""What passes of several rows have won and lost against passes of one.

In usual passes of one row, as long as those were at that moment: a loss among the first passes, which read every expert
from disk, must not count for hundreds of later ones.
"""

MOST_LOST = 0.015  # of all passes so far
CREDIT = 1.0  # so many may be lost before anything was won
MOST_WON = 2.0  # that cover later losses: about a pass of eight rows of which one counts


class Balance:
    """Of one way to fill passes: once it has lost too much, it has to wait."""

    def __init__(self) -> None:
        self._won = 0.0
        self._spent = 0.0

    def note(self, num_tokens: float, spent: float) -> None:
        """A pass gave so many tokens, and took as long as `spent` usual ones, which give a token each."""
        self._spent += spent
        self._won = min(self._won + num_tokens - spent, MOST_WON)

    @property
    def left(self) -> float:
        """Usual passes that may still be lost; negative where too many were."""
        return self._won + MOST_LOST * self._spent + CREDIT
