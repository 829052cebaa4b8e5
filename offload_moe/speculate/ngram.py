"""Prompt lookup: what followed the last tokens where they stood before, in the prompt or in the answer.

Source: A. Saxena, "Prompt Lookup Decoding" (2023).
"""

from bisect import bisect_right
from collections.abc import Sequence

from offload_moe.speculate.guess import NO_GUESS, Guess

SHORTEST, LONGEST = 1, 16  # tokens that are compared
INDEXED = (2, 1)  # tokens whose places are kept
MOST_PLACES = 16  # the last ones, of each pair and each single token
LENGTHS = (2, 3, 4, 6, 10)  # of matches, between which the kinds lie


class NgramSource:
    """Looks for the longest match of the last tokens, the latest of equal ones. A kind is a range of lengths."""

    certainties = (0.05, 0.1, 0.2, 0.4, 0.7, 0.9)  # low ones cost nothing: what they are is soon known
    is_free = True

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # of tokens, how many there are up to their end

    def begin(self, ids: Sequence[int]) -> None:
        self._ids, self._ends = [], {}
        for token in ids:
            self.take(token)

    def take(self, token: int) -> None:
        self._ids.append(token)
        for size in INDEXED[-len(self._ids) :]:  # a single token ends no pair
            ends = self._ends.setdefault(tuple(self._ids[-size:]), [])
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
        for size in INDEXED:
            ends = self._ends.get(tuple(self._ids[-size:]), [])
            for end in reversed(ends[-MOST_PLACES - 1 : -1]):  # the last one is the end of the sequence
                length = self._num_alike(end, size)
                if length > longest:
                    best, longest = end, length
            if longest:
                break
        return best, longest

    def _num_alike(self, end: int, length: int) -> int:
        """How many tokens before `end` are the last ones of the sequence: so many, or more."""
        ids, last = self._ids, len(self._ids)
        while length < min(LONGEST, end) and ids[end - length - 1] == ids[last - length - 1]:
            length += 1
        return length
