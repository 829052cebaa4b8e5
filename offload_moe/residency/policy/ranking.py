"""What every expert of a pool is worth, and which of the resident ones least: the numbers of the default policy.

Shapes: X all experts of the pool.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from offload_moe.residency.policy.history import History
from offload_moe.residency.policy.reuse import ReuseModel


class Passed(NamedTuple):
    """Layers that were passed: their experts are `first` to `end`.

    keys: what they used. shares: of the `num_tokens` tokens that used them. observes: keep it as this token's routing.
    learns: let it change what the features are worth.
    """

    keys: Sequence[int]
    shares: Sequence[float]
    first: int
    end: int
    num_layers: int
    num_tokens: int
    observes: bool
    learns: bool


class Ranking:
    """In numpy, a fixed number of calls on arrays of M tokens and of some layers' experts.

    All arrays are written in place: native code has their addresses.
    """

    def __init__(self, num_keys: int, discount: float) -> None:
        self.history = History(num_keys, discount)
        self.reuse = ReuseModel(num_keys, discount)
        self.worth = np.zeros(num_keys, dtype=np.float32)  # [X]: when the token reaches the expert's layer
        self.absent = np.full(num_keys, np.inf, dtype=np.float32)  # [X]: 0 where resident
        self.order = self.absent.copy()  # [X]: worth now where resident, infinite elsewhere
        self.use_discount(discount)

    def use_discount(self, discount: float) -> None:
        """From now on; what was learned with the one before fades by itself."""
        self.discount = np.float32(discount)
        self.history.use_discount(discount)
        self.reuse.use_discount(discount)

    def rank(self, passed: Passed) -> None:
        """Learn from layers that were passed, and rank their experts for the next token."""
        first, end = passed.first, passed.end
        keys = np.array(passed.keys, dtype=np.intp)
        used = np.zeros(end - first, dtype=np.float32)
        used[keys - first] = passed.shares
        if passed.observes:
            self.history.observe(keys, passed.num_layers)
        foretold, trust = self.history.foretells(first, end)
        worth = self.reuse.update(first, end, used, foretold, trust, passed.learns, passed.num_tokens)
        self.worth[first:end] = worth
        np.add(worth * self.discount, self.absent[first:end], out=self.order[first:end])

    def advance(self) -> None:
        """Go on to the next token."""
        np.add(self.worth, self.absent, out=self.order)
        self.history.advance()
        self.reuse.advance()
