"""A decode step of all layers in one native call: the counterpart of `csrc/span.c`.

L MoE layers, K top-k.
"""

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from offload_moe.native.kernels import ARRIVING, HIT, MISSING, NEEDS_EXPERTS, NEEDS_SLOTS
from offload_moe.residency.reserved import PassAccounts, ReservedSlots
from offload_moe.residency.scheduler import Scheduler
from offload_moe.simulate.clock import VirtualClock
from offload_moe.simulate.costs import RunCosts
from offload_moe.simulate.helper import Helper
from offload_moe.simulate.processor import Processor
from offload_moe.simulate.reader import VirtualReader

Guesses = Sequence[tuple[int, Sequence[int]]]  # later layers, and their predicted experts


class VirtualPasses:
    """Token passes through all layers, with reads of missing experts into reserved slots."""

    def __init__(
        self,
        clock: VirtualClock,
        processor: Processor,
        costs: RunCosts,
        scheduler: Scheduler,
        reader: VirtualReader,
    ) -> None:
        """reader: fills the scheduler's slots."""
        self._clock = clock
        self._processor = processor
        self._costs = costs
        self._scheduler = scheduler
        self._slot_table = scheduler.residency.table
        self._reads = reader
        reader.transfers.account_to(PassAccounts(scheduler))
        scheduler.reserved = reserved = ReservedSlots(scheduler, reader)
        self._helper = Helper(clock, scheduler, reserved, costs)

    def forward(self, experts: NDArray[Any], guess: Callable[[int], Guesses]) -> None:
        """experts ``[L, K]``. guess: the predictions of a layer for those behind it."""
        self._helper.begin(may_evict=self._scheduler.residency.num_slots < self._scheduler.keys.total)
        for layer, chosen in enumerate(experts.tolist()):
            self._layer(layer, chosen, guess)
        self._helper.end()

    def _layer(self, layer: int, chosen: Sequence[int], guess: Callable[[int], Guesses]) -> None:
        self._processor.run(self._costs.layer_host_s, self._costs.dense(1))
        guesses = guess(layer)
        keys_of = self._scheduler.keys
        keys = keys_of.keys(layer, sorted(chosen))
        here = self._slot_table.lease_arrived(keys)
        self._reads.drop_wrong(keys_of.end(layer), keys)
        found, needs = self._fetch(keys, here)
        for ahead, guessed in guesses:
            self._fetch_guesses(keys_of.keys(ahead, guessed))
        if self._reads.are_short:
            needs |= NEEDS_SLOTS
        self._helper.routed(sorted(chosen), found)
        if needs:
            self._helper.need(needs)
        self._compute(keys, here, has_asked=bool(needs & NEEDS_EXPERTS))
        self._slot_table.release(keys)

    def _fetch(self, keys: Sequence[int], here: Sequence[int]) -> tuple[list[int], int]:
        """Start reads of missing experts. Returns how each was found, and the requests to Python."""
        found, needs = [], 0
        for key in keys:
            if key in here:
                found.append(HIT)
            elif self._scheduler.residency.find(key) is not None:
                found.append(ARRIVING)
                self._reads.demand(key)
            else:
                found.append(MISSING)
                needs |= 0 if self._reads.fetch(key) else NEEDS_EXPERTS
        return found, needs

    def _fetch_guesses(self, keys: Sequence[int]) -> None:
        for key in keys:
            if self._scheduler.residency.find(key) is None:
                self._reads.fetch(key, is_prefetch=True)

    def _compute(self, keys: Sequence[int], here: Sequence[int], *, has_asked: bool) -> None:
        """Compute in waves, each with all arrivals so far. has_asked: a request was made for the others."""
        costs, left = self._costs, [key for key in keys if key not in here]
        self._processor.run(costs.partial_host_s if left else 0.0, costs.experts([1] * len(here)))
        while left:
            if not has_asked and not all(self._scheduler.residency.find(key) is not None for key in left):
                self._helper.need(NEEDS_EXPERTS)  # one was read and evicted while the others were computed
                has_asked = True
            here = self._wait(left)
            left = [key for key in left if key not in here]
            self._processor.run(len(here) * costs.late_host_s, costs.experts([1] * len(here)))

    def _wait(self, keys: Sequence[int]) -> list[int]:
        """Wait until some of them are resident."""
        began = self._clock.now
        while not (here := self._slot_table.lease_arrived(keys)):
            has_happened = self._clock.run_next()
            assert has_happened, "an expert of a token pass never arrives"
        self._scheduler.counters.stall_s += self._clock.now - began
        return here
