"""The worth of every expert of a pool, and the least of the resident ones: the numbers of the default policy.

Layers that were passed are ranked in one native call (`csrc/ranking.c`): a decode step's experts have just passed
through the processor's caches, and thirty calls of numpy are slow after that. Shapes: X all experts of the pool.
"""

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from offload_moe.native.library import load_for_short_calls
from offload_moe.native.structs import PassedStruct, RankingStruct
from offload_moe.residency.policy.history import NUM_NEIGHBOURS, SHARPNESS, History
from offload_moe.residency.policy.reuse import SHRINKAGE, ReuseModel


class Passed(NamedTuple):
    """Layers that were passed: their experts are `first` to `end`.

    keys: the experts that they used. shares: of the `num_tokens` tokens that used them. observes: whether it is kept as
    this token's routing. learns: whether the weights of the features are fitted to it.
    """

    keys: Sequence[int]
    shares: Sequence[float]
    first: int
    end: int
    num_layers: int
    num_tokens: int
    observes: bool
    learns: bool


class Span(NamedTuple):
    """Layers whose experts are `first` to `end`, of which a token uses so many."""

    num_keys: int
    first: int
    end: int
    num_layers: int


class Ranking:
    """The worth of the experts of a pool. Its arrays are written in place, as native code has their addresses."""

    def __init__(self, num_keys: int, discount: float) -> None:
        self.history = History(num_keys, discount)
        self.reuse = ReuseModel(num_keys, discount)
        self.worth = np.zeros(
            num_keys, dtype=np.float32
        )  # [X]: as of the moment when the token reaches the expert's layer
        self.absent = np.full(num_keys, np.inf, dtype=np.float32)  # [X]: 0 where resident
        self.order = self.absent.copy()  # [X]: worth now where resident, infinite elsewhere
        self.use_discount(discount)
        self._spans: Sequence[Span] = ()  # of the last `rank_token`
        self._struct, self._given = self._describe(), PassedStruct()
        self._addresses = ctypes.addressof(self._struct), ctypes.addressof(self._given)
        self._native = load_for_short_calls().om_rank

    def use_discount(self, discount: float) -> None:
        """Use another discount from now on; what was learned with the last one fades."""
        self.discount = np.float32(discount)
        self.history.use_discount(discount)
        self.reuse.use_discount(discount)

    def rank(self, passed: Passed) -> None:
        """Learn from layers that were passed, and rank their experts for the next token."""
        assert len(passed.keys) == len(passed.shares)
        keys, shares = array("i", passed.keys), array("f", passed.shares)
        given = self._given
        given.keys, given.num_keys = keys.buffer_info()
        given.shares = shares.buffer_info()[0]
        given.first, given.end = passed.first, passed.end
        given.decay = self.history.fade(len(keys), passed.num_layers) if passed.observes else 1.0
        given.matchable = self.history.matchable
        given.slow_step, given.fast_step = self.reuse.steps(passed.num_tokens)
        given.discount = self.discount
        given.observes, given.learns = passed.observes, passed.learns and self.reuse.is_learning
        self._native(*self._addresses, 1)

    def rank_token(self, keys: Sequence[int], spans: Sequence[Span]) -> None:
        """As `rank` of one span of layers after the other, that one token passed, which is kept and learned from.

        keys: of all spans.
        """
        if spans is not self._spans:
            self._use_spans(spans)
        self._keys[:] = keys
        fade = self.history.fade
        faded = [(fade(span.num_keys, span.num_layers), self.history.matchable) for span in spans]
        given = self._token
        given["decay"], given["matchable"] = zip(*faded, strict=True)
        given["slow_step"], given["fast_step"] = self.reuse.steps(1)
        given["discount"], given["learns"] = self.discount, self.reuse.is_learning
        self._native(self._addresses[0], given.ctypes.data, len(spans))

    def _use_spans(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        counts = [span.num_keys for span in spans]
        self._keys, self._ones = np.zeros(sum(counts), dtype=np.int32), np.ones(sum(counts), dtype=np.float32)
        self._token = np.zeros(len(spans), dtype=np.dtype(PassedStruct))
        offsets = np.cumsum([0, *counts[:-1]])
        self._token["keys"] = self._keys.ctypes.data + self._keys.itemsize * offsets
        self._token["shares"] = self._ones.ctypes.data + self._ones.itemsize * offsets
        for name in ("num_keys", "first", "end"):
            self._token[name] = [getattr(span, name) for span in spans]
        self._token["observes"] = True

    def advance(self) -> None:
        """Begin the next token."""
        np.add(self.worth, self.absent, out=self.order)
        self.history.advance()
        self.reuse.advance()

    def _describe(self) -> RankingStruct:
        history, reuse = self.history, self.reuse
        arrays = {
            **{name: getattr(history, name) for name in ("used", "was_used", "future", "matched")},
            **{name: getattr(reuse, name) for name in ("features", "weights", "covariance", "evidence")},
            **{name: getattr(self, name) for name in ("worth", "order", "absent")},
        }
        return RankingStruct(
            num_keys=len(self.worth),
            num_tokens=len(history.matched),
            num_neighbours=NUM_NEIGHBOURS,
            sharpness=SHARPNESS,
            shrinkage=SHRINKAGE,
            **{name: values.ctypes.data for name, values in arrays.items()},
        )
