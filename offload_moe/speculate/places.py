"""Where runs of tokens stand in a sequence."""

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice

MOST_PLACES = 16  # the last ones, that are looked at


class Places:
    """Of all runs of `size` tokens. A place is how many tokens there are up to the end of a run."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._last: dict[tuple[int, ...], int] = {}
        self._before = array("q")  # of the run that ends with each token, the place before; 0 for none

    def add(self, ids: Sequence[int]) -> None:
        """The sequence has one more token, the last of these."""
        run = tuple(ids[-self._size :])
        self._before.append(self._last.get(run, 0))
        self._last[run] = len(ids)

    def drop(self, ids: Sequence[int]) -> None:
        """The last of these tokens, which are all, goes."""
        run, before = tuple(ids[-self._size :]), self._before.pop()
        if before:
            self._last[run] = before
        else:
            del self._last[run]

    def of_end(self, ids: Sequence[int]) -> Iterator[int]:
        """Of the run at the end of these tokens, the latest first, without the end of the sequence."""
        return islice(self._of_end(ids), MOST_PLACES)

    def _of_end(self, ids: Sequence[int]) -> Iterator[int]:
        place = self._last.get(tuple(ids[-self._size :]), 0)
        while place:
            if place < len(ids):
                yield place
            place = self._before[place - 1]
