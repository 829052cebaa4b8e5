"""How passes of the card are entered into the host's residency, policy and counters."""

import ctypes

import numpy as np
from numpy.typing import NDArray

from offload_moe.card.log import LayerLog, layers_of
from offload_moe.card.model import DecoderParts
from offload_moe.card.pool import CardPool
from offload_moe.card.steps import CardSteps
from offload_moe.native.constants import MISSING
from offload_moe.native.session import Session
from offload_moe.residency.accounts import Choice, note_passed
from offload_moe.residency.hierarchy import Hierarchy


class Account:
    """Reads the log of each pass. ordinals: of the layers with experts, by their number in the decoder."""

    def __init__(self, parts: DecoderParts, hierarchy: Hierarchy, pool: CardPool) -> None:
        self._hierarchy, self._pool = hierarchy, pool
        routed = [(index, layer.spec.router) for index, layer in enumerate(parts.layers)]
        self._layers = [(index, router.top_k) for index, router in routed if router is not None]
        self.ordinals = {index: ordinal for ordinal, (index, _) in enumerate(self._layers)}
        self._number = 0
        self._num_entered: dict[int, int] = {}  # changes of each layer of this pass

    def begin(self, number: int) -> None:
        """A pass of this number begins."""
        self._number = number
        self._num_entered.clear()

    def follow(self, log: NDArray[np.int32], steps: CardSteps, num_rows: int) -> list[LayerLog]:
        """Enter the changes of slots that have not been entered yet. Returns all layers noted so far."""
        ints = log[: steps.num_layers * steps.log_ints].reshape(steps.num_layers, steps.log_ints)
        found = layers_of(ints, self._layers, max_rows=steps.rows, num_rows=num_rows, number=self._number)
        with self._hierarchy.scheduler.changed:
            for layer in found:
                self._pool.replay(layer.changes[self._num_entered.get(layer.layer, 0) :])
                self._num_entered[layer.layer] = len(layer.changes)
        return found

    def enter(self, log: NDArray[np.int32], steps: CardSteps, num_rows: int) -> int:
        """Account for a pass that has ended. Returns how many experts it missed."""
        layers = self.follow(log, steps, num_rows)
        choices = [_choice(layer) for layer in layers]
        note_passed(self._hierarchy.scheduler, 0, choices, num_rows)
        num_missed = sum(list(choice.found).count(MISSING) for choice in choices)
        num_fetched = sum(len(layer.changes) for layer in layers)
        counters = self._hierarchy.counters
        counters.num_evictions = self._hierarchy.scheduler.residency.num_evictions
        counters.h2d_bytes += num_fetched * self._hierarchy.pools.slot_bytes
        return num_missed

    def read_back(self, session: Session) -> None:
        """A pass was given up: enter what is in the slots now."""
        slot_of = (ctypes.c_int32 * len(self._pool.slot_of))()
        session.download(self._pool.tables.slot_of, slot_of)
        with self._hierarchy.scheduler.changed:
            self._pool.read_back(list(slot_of))


def _choice(layer: LayerLog) -> Choice:
    """The distinct experts of a layer: in the router's order for one row, else ascending."""
    if len(layer.ids) == 1:
        return Choice(layer.ids[0].tolist(), layer.found[0].tolist())
    experts, places, counts = np.unique(layer.ids, return_index=True, return_counts=True)
    return Choice(experts.tolist(), layer.found.flat[places].tolist(), (counts / len(layer.ids)).tolist())
