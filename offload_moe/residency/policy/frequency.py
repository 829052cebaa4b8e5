"""Least frequently used, plain and with decay."""

import math
from collections.abc import Sequence

from offload_moe.residency.policy.ranked import Ranked

HALF_LIFE = 20.0  # tokens


class LFU(Ranked):
    """Evicts the expert with the fewest uses since the start, resident or not."""

    name = "lfu"

    def raise_rank(self, layer: int, key: int) -> float:
        return self._rank.get(key, 0.0) + 1.0


class DecayedFrequency(Ranked):
    """Evicts the lowest use count in which a use weighs half as much after every `half_life` tokens.

    All counts shrink alike, so instead of decaying them the weight of a new use grows, kept as a base-2 logarithm.
    A layer's clock is the number of its accesses.
    """

    name = "decayed"

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        super().__init__()
        self._half_life = half_life
        self._num_accesses: dict[int, int] = {}

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        self._num_accesses[layer] = self._num_accesses.get(layer, 0) + 1
        super().access(layer, keys, weights, num_tokens)

    def raise_rank(self, layer: int, key: int) -> float:
        gain = self._num_accesses[layer] / self._half_life
        rank = self._rank.get(key)
        if rank is None:
            return gain
        high, low = (gain, rank) if gain > rank else (rank, gain)
        return high + math.log2(1.0 + 2.0 ** (low - high))
