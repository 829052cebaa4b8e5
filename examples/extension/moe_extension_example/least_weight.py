"""A policy: keep the experts whose routing weights sum up to the most."""

from collections.abc import Callable, Sequence

from offload_moe.residency.keys import ExpertKeys


class LeastWeight:
    """Evicts the expert with the least total routing weight; the lower key loses a tie. O(resident experts)."""

    name = "least-weight"

    def __init__(self, keys: ExpertKeys, layers: range, num_slots: int) -> None:
        self._total = [0.0] * keys.total
        self._resident: set[int] = set()

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        for key, weight in zip(keys, weights or [1.0] * len(keys), strict=True):
            self._total[key] += weight * num_tokens

    def insert(self, key: int) -> None:
        self._resident.add(key)

    def remove(self, key: int) -> None:
        self._resident.remove(key)

    def resize(self, num_slots: int) -> None:
        """Do nothing: the order does not depend on the number of slots."""

    def victim(self, leased: Callable[[int], bool]) -> int | None:
        evictable = (key for key in self._resident if not leased(key))
        return min(evictable, key=lambda key: (self._total[key], key), default=None)
