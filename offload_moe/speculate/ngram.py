"""Prompt lookup: what followed the last tokens where they stood before, in the prompt or in the answer.

Source: A. Saxena, "Prompt Lookup Decoding" (2023).
"""

from bisect import bisect_right
from collections.abc import Sequence

from offload_moe.speculate.guess import NO_GUESS, Guess

SHORTEST, LONGEST = 2, 16  # tokens that are compared
MOST_PLACES = 16  # where a pair of tokens stood last
LENGTHS = (3, 4, 6, 10)  # of matches, between which the kinds lie


class NgramSource:
    """Looks for the longest match of the last tokens, the latest of equal ones. A kind is a range of lengths."""

    certainties = (0.3, 0.45, 0.6, 0.75, 0.9)
    is_free = True

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, int], list[int]] = {}  # of each pair, how many tokens there are up to its end

    def begin(self, ids: Sequence[int]) -> None:
        self._ids, self._ends = [], {}
        for token in ids:
            self.take(token)

    def take(self, token: int) -> None:
        self._ids.append(token)
        if len(self._ids) < SHORTEST:
            return
        ends = self._ends.setdefault((self._ids[-2], token), [])
        ends.append(len(self._ids))
        if len(ends) > 2 * MOST_PLACES:
            del ends[:-MOST_PLACES]

    def guess(self, most: int) -> Guess:
        """A match that the last tokens themselves belong to is continued as a repetition."""
        end, length = self._longest_match()
        if not length:
            return NO_GUESS
        period = len(self._ids) - end
        tokens = tuple(self._ids[end + at % period] for at in range(most))
        return Guess(tokens, bisect_right(LENGTHS, length))

    def _longest_match(self) -> tuple[int, int]:
        """Where it ends, and its length; 0 for none."""
        best, longest = 0, 0
        if len(self._ids) < SHORTEST:
            return best, longest
        *earlier, _ = self._ends[(self._ids[-2], self._ids[-1])]
        for end in reversed(earlier[-MOST_PLACES:]):
            length = self._num_alike(end)
            if length > longest:
                best, longest = end, length
        return best, longest

    def _num_alike(self, end: int) -> int:
        """How many tokens before `end` are the last ones of the sequence."""
        ids, last = self._ids, len(self._ids)
        length = SHORTEST
        while length < min(LONGEST, end) and ids[end - length - 1] == ids[last - length - 1]:
            length += 1
        return length
