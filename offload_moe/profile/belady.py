"""Belady's optimum: evict the expert whose next use is furthest in the future. The upper bound of all policies."""

import heapq
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

NEVER = np.iinfo(np.int64).max


class Belady:
    """A policy that is given the whole trace. Optimal for exactly that order of accesses.

    experts: [tokens, layers, top-k], the layers of this pool only, accessed token by token and layer by layer.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
    """

    name = "belady"

    def __init__(self, experts: NDArray[np.integer], *, num_experts: int) -> None:
        self._next_uses = iter(next_uses(experts, num_experts).reshape(-1, experts.shape[2]).tolist())
        self._next_use: dict[int, int] = {}
        self._resident: set[int] = set()
        self._heap: list[tuple[int, int]] = []  # (-next use, key); outdated entries are dropped when they reach the top

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        for key, next_use in zip(keys, next(self._next_uses), strict=True):
            self._next_use[key] = next_use
            if key in self._resident:
                heapq.heappush(self._heap, (-next_use, key))

    def insert(self, key: int) -> None:
        self._resident.add(key)
        heapq.heappush(self._heap, (-self._next_use[key], key))

    def remove(self, key: int) -> None:
        self._resident.remove(key)

    def resize(self, num_slots: int) -> None:
        """Does nothing, because the optimum does not depend on the number of slots."""

    def victim(self, leased: Callable[[int], bool]) -> int | None:
        heap, passed, chosen = self._heap, [], None
        while heap and chosen is None:
            entry = heap[0]
            if entry[1] not in self._resident or -entry[0] != self._next_use[entry[1]]:
                heapq.heappop(heap)
            elif leased(entry[1]):
                passed.append(heapq.heappop(heap))
            else:
                chosen = entry[1]
        for entry in passed:
            heapq.heappush(heap, entry)
        return chosen


def next_uses(experts: NDArray[np.integer], num_experts: int) -> NDArray[np.int64]:
    """[tokens, layers, top-k]: the step (`token * layers + layer`) of each expert's next use, or NEVER."""
    num_tokens, num_layers, _ = experts.shape
    upcoming = np.full((num_layers, num_experts), NEVER)
    layers = np.arange(num_layers)[:, None]
    found = np.empty(experts.shape, dtype=np.int64)
    for token in range(num_tokens - 1, -1, -1):
        found[token] = upcoming[layers, experts[token]]
        upcoming[layers, experts[token]] = token * num_layers + layers
    return found
