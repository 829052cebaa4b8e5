"""Policies that keep one number per expert which only grows with use: LFU, decayed frequency, LRU-2."""

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import count


class Ranked(ABC):
    """Evicts the lowest rank; the older use loses a tie. Ranks outlive residency. O(log n) amortized.

    The heap is lazy: `access` raises a rank without touching it, and `victim` pushes an outdated entry back where it
    belongs. That is exact because ranks never fall.
    """

    name: str

    def __init__(self) -> None:
        self._rank: dict[int, float] = {}
        self._last_use: dict[int, int] = {}
        self._resident: set[int] = set()
        self._heap: list[tuple[float, int, int]] = []  # (rank, last use, key): one entry per resident key
        self._queued: set[int] = set()
        self._clock = count(1)

    @abstractmethod
    def raise_rank(self, layer: int, key: int) -> float:
        """The rank of `key` after one more use in `layer`."""

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        for key in keys:
            self._rank[key] = self.raise_rank(layer, key)
            self._last_use[key] = next(self._clock)

    def insert(self, key: int) -> None:
        self._resident.add(key)
        if key not in self._queued:  # an entry from an earlier stay ranks too low at worst, which `victim` repairs
            self._queued.add(key)
            heapq.heappush(self._heap, self._entry(key))

    def remove(self, key: int) -> None:
        self._resident.remove(key)

    def resize(self, num_slots: int) -> None:  # noqa: B027 (a subclass may override it)
        """Do nothing: ranks do not depend on the number of slots."""

    def victim(self, leased: Callable[[int], bool]) -> int | None:
        heap, passed, chosen = self._heap, [], None
        while heap and chosen is None:
            entry = heap[0]
            key = entry[2]
            if key not in self._resident:
                heapq.heappop(heap)
                self._queued.remove(key)
            elif (current := self._entry(key)) != entry:
                heapq.heapreplace(heap, current)
            elif leased(key):
                passed.append(heapq.heappop(heap))
            else:
                chosen = key
        for entry in passed:
            heapq.heappush(heap, entry)
        return chosen

    def _entry(self, key: int) -> tuple[float, int, int]:
        return self._rank.get(key, -math.inf), self._last_use.get(key, 0), key
