"""The runtime in virtual time: its own schedulers, residencies, policies and prefetch governor, with virtual movers.

T tokens of a forward, L MoE layers, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload_moe.memory.mover import Mover
from offload_moe.native.slot_table import SlotTable
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import DEFAULT_POLICY, policy_of_pool
from offload_moe.residency.reserved import SLOTS_PER_CHOICE
from offload_moe.residency.residency import Residency
from offload_moe.residency.scheduler import Scheduler
from offload_moe.simulate.card import VirtualCard
from offload_moe.simulate.clock import VirtualClock, VirtualCondition
from offload_moe.simulate.costs import DiskModel, LinkModel, LookaheadModel, RunCosts
from offload_moe.simulate.disk import VirtualDisk
from offload_moe.simulate.guesses import Guesser
from offload_moe.simulate.link import VirtualLink
from offload_moe.simulate.processor import DeviceProcessor, Processor
from offload_moe.simulate.reader import VirtualReader
from offload_moe.simulate.token_pass import VirtualPasses


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualPools:
    """Slots of each tier, all layers together; 0 device slots: RAM is the fast tier."""

    keys: ExpertKeys
    slot_bytes: int
    num_ram_slots: int
    num_device_slots: int = 0
    policy: str = DEFAULT_POLICY


class VirtualRuntime:
    """Forwards one after another: prompts as `experts.attach.BoundExperts` computes them, tokens as passes.

    card: passes of a device; None where tokens go another way.
    """

    def __init__(
        self,
        pools: VirtualPools,
        costs: RunCosts,
        disk: DiskModel,
        link: LinkModel | None = None,
        lookahead: LookaheadModel | None = None,
    ) -> None:
        """link: required with device slots."""
        self.clock = VirtualClock()
        self.processor = (DeviceProcessor if costs.has_device else Processor)(self.clock)
        self._pools = pools
        self._costs = costs
        table, changed = SlotTable(pools.keys.total, pools.num_ram_slots), VirtualCondition(self.clock)
        reader = VirtualReader(table, VirtualDisk(self.clock, disk, pools.slot_bytes), changed)
        self.ram = self._scheduler(table, reader.transfers, "disk_bytes", changed)
        self.scheduler = self.ram
        has_passes = costs.has_token_passes and not pools.num_device_slots
        passes = VirtualPasses(self.clock, self.processor, costs, self.ram, reader) if has_passes else None
        self._passes = passes
        if pools.num_device_slots:
            assert link is not None
            mover = VirtualLink(self.clock, link, self.ram, self.processor, pools.slot_bytes)
            table, changed = SlotTable(pools.keys.total, pools.num_device_slots), VirtualCondition(self.clock)
            self.scheduler = self._scheduler(table, mover, "h2d_bytes", changed)
        self.card: VirtualCard | None = None
        if pools.num_device_slots and costs.device_pass is not None:
            self.card = VirtualCard(self.clock, costs, costs.device_pass, self.scheduler, self.ram, pools.slot_bytes)
        is_whole = self.scheduler.residency.num_slots >= pools.keys.total
        self._guesser = Guesser(self.clock, LookaheadModel() if lookahead is None or is_whole else lookahead)

    def resize(self, num_slots: int) -> None:
        """Have so many slots in the fast tier, as `offload_moe.residency.hierarchy.Hierarchy.resize` does."""
        num_slots = min(num_slots, self._pools.keys.total)
        num_before = self.scheduler.residency.num_slots
        if num_slots > num_before:
            self.scheduler.grow(num_slots)
        elif num_slots < num_before:
            self.scheduler.shrink(num_slots)

    def forward(self, experts: NDArray[Any]) -> float:
        """experts ``[T, L, K]``. Returns the seconds."""
        began = self.clock.now
        num_tokens, num_layers, top_k = experts.shape
        if num_tokens == 1 and self.card is not None:
            self.card.forward(experts[0])
            return self.clock.now - began
        self.processor.run(self._costs.token_host_s, self._costs.token_s)
        if num_tokens != 1:
            self._guesser.pause()
        passes = self._passes
        if num_tokens == 1 and passes is not None and self.ram.residency.num_slots >= SLOTS_PER_CHOICE * top_k:
            passes.forward(experts[0], lambda layer: self._guess(layer, experts[0]))
        else:
            for layer in range(num_layers):
                self._layer(layer, experts)
        self.processor.synchronize()  # sampling the next token needs the result
        return self.clock.now - began

    def _layer(self, layer: int, experts: NDArray[Any]) -> None:
        costs, num_tokens = self._costs, len(experts)
        self.processor.run(costs.layer_host_s, costs.dense(num_tokens))
        self.processor.synchronize()
        tokens_of = _tokens_per_expert(experts[:, layer])
        shares = [count / num_tokens for count in tokens_of.values()]
        with self.scheduler.acquire(layer, list(tokens_of), shares, num_tokens) as lease:
            if num_tokens == 1:
                self._look_ahead(layer, experts[0], list(tokens_of))
            num_computed = 0
            for wave in lease:
                host_s = costs.wave_host_s + len(wave) * costs.expert_host_s
                if num_computed:
                    host_s += len(wave) * costs.late_host_s
                elif len(wave) < len(tokens_of):
                    host_s += costs.partial_host_s
                num_computed += len(wave)
                self.processor.run(host_s, costs.experts([tokens_of[expert] for expert, _ in wave]))

    def _look_ahead(self, layer: int, experts: NDArray[Any], present: Sequence[int]) -> None:
        """experts ``[L, K]``."""
        keys = self._pools.keys
        keep = {*keys.keys(layer, present)}
        for ahead, guessed in self._guess(layer, experts):
            self.scheduler.prefetch(ahead, guessed, keep)
            keep |= {*keys.keys(ahead, guessed)}

    def _guess(self, layer: int, experts: NDArray[Any]) -> list[tuple[int, list[int]]]:
        """experts ``[L, K]``."""
        guesses = self._guesser.guesses(layer, experts)
        self.processor.run(len(guesses) * self._costs.probe_host_s, 0.0)
        return guesses

    def _scheduler(
        self,
        table: SlotTable,
        mover: Mover,
        bytes_counter: str,
        changed: VirtualCondition,
    ) -> Scheduler:
        pools = self._pools
        policy = policy_of_pool(pools.policy, pools.keys, num_slots=table.num_slots)
        return Scheduler(
            Residency(table, policy),
            mover,
            keys=pools.keys,
            bytes_counter=bytes_counter,
            clock=self.clock,
            changed=changed,
        )


def _tokens_per_expert(chosen: NDArray[Any]) -> dict[int, int]:
    """chosen ``[T, K]`` -> experts, ascending, and the number of tokens of each."""
    if len(chosen) == 1:
        return dict.fromkeys(sorted(chosen[0].tolist()), 1)
    found, counts = np.unique(chosen, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
