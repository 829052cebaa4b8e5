"""Keys: the number of each expert of a model. Imports no torch.

Layers may have different numbers of experts, as pruned models do: the keys of a layer follow those of the layer before.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any


class ExpertKeys:
    """Keys of the experts of all MoE layers, ``0 .. total - 1``, ascending by layer and expert."""

    def __init__(self, num_experts: Iterable[int]) -> None:
        """num_experts: of each layer."""
        self.num_experts = tuple(num_experts)
        self._firsts = (0, *accumulate(self.num_experts))

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.num_experts)

    @property
    def total(self) -> int:
        """Experts of all layers together."""
        return self._firsts[-1]

    @property
    def most(self) -> int:
        """The most experts of any layer: the width of an array with a row for each layer."""
        return max(self.num_experts)

    def first(self, layer: int) -> int:
        """The key of the layer's first expert."""
        return self._firsts[layer]

    def end(self, layer: int) -> int:
        """The key behind the layer's last expert."""
        return self._firsts[layer + 1]

    def key(self, layer: int, expert: int) -> int:
        """The key of an expert."""
        return self._firsts[layer] + expert

    def keys(self, layer: int, experts: Iterable[int]) -> list[int]:
        """The keys of experts of one layer."""
        first = self._firsts[layer]
        return [first + expert for expert in experts]

    def layer_expert(self, key: int) -> tuple[int, int]:
        """Layer and expert of a key."""
        layer = bisect_right(self._firsts, key) - 1
        return layer, key - self._firsts[layer]

    def rows(self, value_of: Callable[[int], Any]) -> list[list[Any]]:
        """The values of a function of each key: a list for each layer."""
        return [[value_of(key) for key in range(first, end)] for first, end in pairwise(self._firsts)]

    def from_rows(self, rows: Sequence[Sequence[Any]]) -> dict[int, Any]:
        """Values by key, from a row for each layer.

        Raises: ValueError when the rows do not have the lengths of these layers.
        """
        if [len(row) for row in rows] != [*self.num_experts]:
            raise ValueError(f"the rows do not fit layers of {self.num_experts} experts")
        return dict(enumerate(value for row in rows for value in row))
