"""Passes of a card that decides about its slots: the virtual counterpart of `offload_moe.card`.

L MoE layers, K top-k.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload_moe.card.mode import ModeChoice
from offload_moe.card.worths import MOST, in_bytes
from offload_moe.native.constants import FREE
from offload_moe.native.kernels import HIT, MISSING
from offload_moe.residency.accounts import Choice, note_passed
from offload_moe.residency.policy import Appraising
from offload_moe.residency.scheduler import Scheduler
from offload_moe.simulate.clock import VirtualClock
from offload_moe.simulate.costs import PassCosts, RunCosts

EMPTY, BY_THE_HOST = 0, 1  # stamps of slots that no pass has used
PER_WORTH = 1 << 32  # more than any stamp
USED_NOW = 1 << 62


class VirtualCard:
    """Tokens through all layers, queued or stepwise, as the runtime's own `ModeChoice` decides.

    A queued pass puts what it misses into the slots that are worth least, by the host's policy as it was when the pass
    before began; a stepwise one changes no slot.

    num_stepwise, num_passes: so far.
    """

    def __init__(
        self, clock: VirtualClock, costs: RunCosts, passes: PassCosts, scheduler: Scheduler, ram: Scheduler, record: int
    ) -> None:
        """scheduler, ram: of the card's slots and of the tier behind them. record: bytes of an expert."""
        self._clock, self._costs, self._passes = clock, costs, passes
        self._scheduler, self._ram, self._record_bytes = scheduler, ram, record
        num_slots = scheduler.residency.num_slots
        self._used = np.zeros(num_slots, dtype=np.int64)
        self._key_of = np.full(num_slots, -1, dtype=np.int64)
        self._now = self._num_layers = scheduler.keys.num_layers  # the card's first pass has number 1
        self._worths = self._next_worths = np.zeros(scheduler.keys.total + 1, dtype=np.int64)  # the last: of no key
        self.mode = ModeChoice()
        self.num_stepwise = self.num_passes = 0

    def forward(self, experts: NDArray[Any]) -> None:
        """experts ``[L, K]``, of one token."""
        self._appraise(has_changed=self._lend())
        is_stepwise, began = self.mode.choose(), self._clock.now
        choices = [self._layer(layer, sorted(chosen), is_stepwise) for layer, chosen in enumerate(experts.tolist())]
        self._scheduler.residency.end_lending()
        note_passed(self._scheduler, 0, choices)
        counters = self._scheduler.counters
        counters.num_evictions = self._scheduler.residency.num_evictions
        num_missed = sum(sum(state == MISSING for state in choice.found) for choice in choices)
        self.mode.measured(self._clock.now - began, 1, num_missed=num_missed, is_stepwise=is_stepwise)
        self.num_passes += 1
        self.num_stepwise += is_stepwise
        self._clock.advance(self._passes.token_s)

    def _layer(self, layer: int, chosen: Sequence[int], is_stepwise: bool) -> Choice:
        self._now += 1
        residency, first = self._scheduler.residency, self._scheduler.keys.first(layer)
        slots = [residency.find(first + expert) for expert in chosen]
        self._used[[slot for slot in slots if slot is not None]] = self._now
        missing = [expert for expert, slot in zip(chosen, slots, strict=True) if slot is None]
        is_stepwise = is_stepwise or len(chosen) > len(self._used)  # more experts than slots: the CPU's
        self._clock.advance(self._costs.dense(1) + self._passes.before_experts(len(missing), is_stepwise=is_stepwise))
        hits_s = (len(chosen) - len(missing)) * self._costs.expert_s
        if is_stepwise:
            self._compute_on_cpu(layer, missing, hits_s)
        else:
            self._fetch(layer, missing, hits_s)
        return Choice(chosen, [HIT if slot is not None else MISSING for slot in slots])

    def _fetch(self, layer: int, missing: Sequence[int], hits_s: float) -> None:
        """A pass stops for what is on disk, before the layer's experts; the rest is fetched beside the hits."""
        counters = self._scheduler.counters
        counters.stall_s += self._bring_to_ram(layer, missing)
        late_s = self._passes.missing(len(missing), self._costs.expert_s, is_stepwise=False)
        self._clock.advance(max(hits_s, late_s))
        counters.stall_s += max(0.0, late_s - hits_s)
        for key in self._scheduler.keys.keys(layer, missing):
            slot = self._least_slot()
            self._scheduler.residency.exchange(slot, key)
            self._used[slot], self._key_of[slot] = self._now, key
        counters.h2d_bytes += len(missing) * self._record_bytes

    def _least_slot(self) -> int:
        """Worth least, of equals the one used longest ago, and none that this layer uses. Compare `om_admit`."""
        is_fresh = (self._now - self._used < self._num_layers) & (self._key_of >= 0)
        ranks = np.where(is_fresh, MOST, self._worths[self._key_of]) * PER_WORTH + self._used
        return int(np.where(self._used == self._now, USED_NOW, ranks).argmin())

    def _compute_on_cpu(self, layer: int, missing: Sequence[int], hits_s: float) -> None:
        """Beside the hits, reads from disk included."""
        counters, began = self._scheduler.counters, self._clock.now
        self._bring_to_ram(layer, missing)
        self._clock.advance(self._passes.missing(len(missing), self._costs.expert_s, is_stepwise=True))
        counters.stall_s += max(0.0, self._clock.now - began - hits_s)
        self._clock.advance_to(began + hits_s)
        counters.num_computed_on_cpu += len(missing)

    def _bring_to_ram(self, layer: int, experts: Sequence[int]) -> float:
        """Returns the seconds that it took."""
        if not experts:
            return 0.0
        began = self._clock.now
        if len(self._ram.resident(layer, experts)) < len(experts):
            self._clock.advance(self._passes.stop_s)
        with self._ram.acquire(layer, experts) as lease:
            for _ in lease:
                pass
        return self._clock.now - began

    def _appraise(self, *, has_changed: bool) -> None:
        """The host enters a pass while the next one is under way, so worths are one pass older, but behind a prompt."""
        policy, before = self._scheduler.residency.policy, self._next_worths
        if isinstance(policy, Appraising):
            self._next_worths = np.append(in_bytes(policy.worths), 0).astype(np.int64)
        self._worths = self._next_worths if has_changed else before

    def _lend(self) -> bool:
        """Once nothing is on its way: see where the host has put what it brought meanwhile. Whether there is any."""
        scheduler = self._scheduler
        scheduler.drain_completions()
        while not scheduler.residency.is_quiet:
            has_happened = self._clock.run_next()
            assert has_happened, "a copy to the card never arrives"
            scheduler.drain_completions()
        table, count = scheduler.residency.table, len(self._used)
        keys = np.frombuffer(table.keys, np.int64)[:count]
        states = np.frombuffer(table.states, np.uint8)[:count]
        changed = keys != self._key_of
        self._used[changed] = np.where(states[changed] == FREE, EMPTY, BY_THE_HOST)
        self._key_of[changed] = keys[changed]
        scheduler.residency.lend()
        return bool(changed.any())
