"""Least recently used."""

from collections.abc import Callable, Sequence


class LRU:
    """Evicts the expert whose last use is oldest. O(1) per routed expert."""

    name = "lru"

    def __init__(self) -> None:
        self._resident: dict[int, None] = {}  # oldest use first: a dict keeps insertion order

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        resident = self._resident
        for key in keys:
            if key in resident:
                del resident[key]
                resident[key] = None

    def insert(self, key: int) -> None:
        self._resident[key] = None

    def remove(self, key: int) -> None:
        del self._resident[key]

    def resize(self, num_slots: int) -> None:
        """Do nothing: the order does not depend on the number of slots."""

    def victim(self, leased: Callable[[int], bool]) -> int | None:
        return next((key for key in self._resident if not leased(key)), None)


class Unranked(LRU):
    """Of a pool with a slot for every expert, which evicts none: uses are not noted."""

    name = "unranked"

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        pass
