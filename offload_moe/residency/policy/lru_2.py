"""LRU-2: the use before the last one decides."""

from offload_moe.residency.policy.ranked import Ranked


class LRU2(Ranked):
    """Evicts the expert whose second most recent use is oldest; one used only once goes before all others.

    Source: O'Neil, O'Neil and Weikum, "The LRU-K page replacement algorithm", SIGMOD 1993, with K = 2 and a correlated
    reference period of zero (a token uses an expert once).
    """

    name = "lru-2"

    def raise_rank(self, layer: int, key: int) -> float:
        return self._last_use.get(key, 0)
