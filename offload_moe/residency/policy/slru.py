"""Segmented LRU."""

from collections.abc import Callable, Sequence
from itertools import chain

PROTECTED_SHARE = 0.6


class SLRU:
    """LRU in two segments: experts that were used while resident are protected from those that were used once. O(1).

    Source: Karedla, Love and Wherry, "Caching strategies to improve disk system performance", Computer 27(3), 1994.
    """

    name = "slru"

    def __init__(self, num_slots: int, protected_share: float = PROTECTED_SHARE) -> None:
        self._protected_share = protected_share
        self._max_protected = 0
        self._probation: dict[int, None] = {}  # both: oldest first
        self._protected: dict[int, None] = {}
        self.resize(num_slots)

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        for key in keys:
            if key in self._protected:
                del self._protected[key]
            elif key in self._probation:
                del self._probation[key]
            else:
                continue
            self._protected[key] = None
            self._demote()

    def insert(self, key: int) -> None:
        self._probation[key] = None

    def remove(self, key: int) -> None:
        del (self._probation if key in self._probation else self._protected)[key]

    def resize(self, num_slots: int) -> None:
        self._max_protected = max(1, int(num_slots * self._protected_share))
        self._demote()

    def victim(self, leased: Callable[[int], bool]) -> int | None:
        return next((key for key in chain(self._probation, self._protected) if not leased(key)), None)

    def _demote(self) -> None:
        """Move the oldest protected experts beyond the segment's size back to probation."""
        while len(self._protected) > self._max_protected:
            oldest = next(iter(self._protected))
            del self._protected[oldest]
            self._probation[oldest] = None
