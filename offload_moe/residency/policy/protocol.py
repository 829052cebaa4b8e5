"""The interface of a replacement policy, which the residency calls."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Policy(Protocol):
    """Decides which resident expert is worth least. Pure Python: a test refuses an import of torch.

    Keys are those of an `ExpertKeys`. One policy serves one pool of slots: the slots of a single layer, or one
    pool shared by all layers. Calls arrive in this order: `access` once per acquire, then for each miss `victim` and
    `remove` (only when no slot is free) and `insert`. A prefetch makes the last three calls, without `access`.
    """

    name: str

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        """Note one acquire: the distinct routed experts of one layer, hits and misses alike, of one token or chunk.

        weights: in the order of `keys`, where the caller has them: of one token the routing weights, of a chunk the
        share of its `num_tokens` that chose each expert. A policy may ignore them.
        """

    def insert(self, key: int) -> None:
        """Note that `key` is resident, by demand or by prefetch."""

    def remove(self, key: int) -> None:
        """Note that `key` is not resident any more. Its history may be kept."""

    def resize(self, num_slots: int) -> None:
        """Adapt to a pool of `num_slots` slots. What was learned is kept."""

    def victim(self, leased: Callable[[int], bool]) -> int | None:
        """The resident key worth least that is not leased, or None when all are leased. Changes no later decision."""


@runtime_checkable
class Appraising(Protocol):
    """A policy that has a number for every expert, resident or not."""

    @property
    def worths(self) -> NDArray[np.float32]:
        """``[X]``, by key: as of the moment when a token reaches the expert's layer. Not a copy.

        Estimates of something from 0 to 1, which may lie beside that.
        """


@runtime_checkable
class OfTokens(Protocol):
    """A policy that notes several layers of one token faster than one after the other."""

    def access_token(self, layer: int, keys: Sequence[Sequence[int]]) -> None:
        """As `Policy.access` of these keys of each layer from `layer` on, in turn."""
