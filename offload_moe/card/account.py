"""How passes of the card are entered into the host's residency, policy and counters."""

import ctypes
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from offload_moe.card.log import LayerLog, layers_of, num_missed
from offload_moe.card.model import DecoderParts
from offload_moe.card.pool import CardPool
from offload_moe.card.steps import CardSteps
from offload_moe.native.session import Session
from offload_moe.residency.accounts import Choice, note_passed
from offload_moe.residency.hierarchy import Hierarchy


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """The log of a pass that has ended, and how many of each layer's changes had been entered before."""

    ints: NDArray[np.int32]
    rows: int
    num_rows: int
    number: int
    num_entered: dict[int, int]


class Account:
    """Reads the log of each pass. A pass that has ended is entered while the next one is under way, or when asked for.

    ordinals: of the layers with experts, by their number in the decoder.
    """

    def __init__(self, parts: DecoderParts, hierarchy: Hierarchy, pool: CardPool) -> None:
        self._hierarchy, self._pool = hierarchy, pool
        routed = [(index, layer.spec.router) for index, layer in enumerate(parts.layers)]
        self._layers = [(index, router.top_k) for index, router in routed if router is not None]
        self.ordinals = {index: ordinal for ordinal, (index, _) in enumerate(self._layers)}
        self._number = 0
        self._num_entered: dict[int, int] = {}  # changes of each layer of this pass
        self._ended: _Ended | None = None

    def begin(self, number: int) -> None:
        """A pass of this number begins."""
        self._number, self._num_entered = number, {}

    def follow(self, log: NDArray[np.int32], steps: CardSteps, num_rows: int) -> None:
        """Enter the changes of slots by a pass that is under way."""
        self.settle()
        self._replay(self._view(log, steps, num_rows))

    def end(self, log: NDArray[np.int32], steps: CardSteps, num_rows: int) -> int:
        """A pass has ended. Returns how many pairs missed their expert."""
        self.settle()
        view = self._view(log, steps, num_rows)
        self._ended = replace(view, ints=view.ints.copy())
        return num_missed(view.ints, self._layers, max_rows=view.rows, num_rows=num_rows)

    def settle(self) -> None:
        """Enter the last pass that has ended."""
        ended, self._ended = self._ended, None
        if ended is None:
            return
        layers = self._replay(ended)
        choices = [_choice(layer, ended.num_rows) for layer in layers]
        note_passed(self._hierarchy.scheduler, 0, choices, ended.num_rows)
        counters = self._hierarchy.scheduler.counters
        counters.num_evictions = self._hierarchy.scheduler.residency.num_evictions
        counters.h2d_bytes += sum(len(layer.changes) for layer in layers) * self._hierarchy.pools.slot_bytes

    def _view(self, log: NDArray[np.int32], steps: CardSteps, num_rows: int) -> _Ended:
        ints = log[: steps.num_layers * steps.log_ints].reshape(steps.num_layers, steps.log_ints)
        return _Ended(ints=ints, rows=steps.rows, num_rows=num_rows, number=self._number, num_entered=self._num_entered)

    def _replay(self, view: _Ended) -> list[LayerLog]:
        found = layers_of(view.ints, self._layers, max_rows=view.rows, num_rows=view.num_rows, number=view.number)
        with self._hierarchy.scheduler.changed:
            for layer in found:
                if layer.changes:
                    self._pool.replay(layer.changes[view.num_entered.get(layer.layer, 0) :])
                    view.num_entered[layer.layer] = len(layer.changes)
        return found

    def read_back(self, session: Session) -> None:
        """A pass was given up: enter what is in the slots now."""
        self.settle()
        slot_of = (ctypes.c_int32 * len(self._pool.slot_of))()
        session.download(self._pool.tables.slot_of, slot_of)
        with self._hierarchy.scheduler.changed:
            self._pool.read_back(list(slot_of))


def _choice(layer: LayerLog, num_rows: int) -> Choice:
    """The distinct experts of a layer: in the router's order for one row, else ascending."""
    if num_rows == 1:
        return Choice(layer.ids, layer.found)
    experts, places, counts = np.unique(layer.ids, return_index=True, return_counts=True)
    return Choice(experts.tolist(), [layer.found[place] for place in places], (counts / num_rows).tolist())
