"""The tiers of one model put together: disk -> RAM, and RAM -> device when there is one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from offload_moe.schedule.counters import Counters
from offload_moe.schedule.policy import DEFAULT_POLICY, LRU, make_policy
from offload_moe.schedule.residency import Residency
from offload_moe.schedule.scheduler import Scheduler
from offload_moe.tiers.arena import Arena
from offload_moe.tiers.copier import Copier
from offload_moe.tiers.device import DeviceMover, DeviceSlots
from offload_moe.tiers.mover import Mover


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """How many slots each tier has. Without a device tier, RAM is the fast tier and `num_device_slots` is 0."""

    num_layers: int
    num_experts: int
    slot_bytes: int
    num_ram_slots: int
    num_device_slots: int = 0
    policy: str = DEFAULT_POLICY


class Hierarchy:
    """`scheduler` is what layers acquire from; `record_of` turns one of its slots into the record's bytes."""

    def __init__(self, pools: Pools, make_mover: Callable[[Arena], Mover], copier: Copier | None = None) -> None:
        """make_mover: fills the RAM arena, from disk as a rule. copier: moves RAM slots to the device."""
        self.pools = pools
        self.arena = Arena(pools.num_ram_slots, pools.slot_bytes)
        self.ram = self._scheduler(pools.num_ram_slots, make_mover(self.arena), "disk_bytes")
        self.scheduler = self.ram
        self.record_of: Callable[[int], Tensor] = self.arena.slot
        if pools.num_device_slots:
            assert copier is not None
            slots = DeviceSlots(copier, pools.num_device_slots, self.arena.slot_bytes)
            mover = DeviceMover(copier, slots, self._borrow)
            self.scheduler = self._scheduler(pools.num_device_slots, mover, "h2d_bytes")
            self.ram.count_bytes_in(self.scheduler.counters)
            self.record_of = slots.slot

    @property
    def counters(self) -> Counters:
        """Running totals: hits and stalls of the fast tier, bytes of every tier."""
        return self.scheduler.counters

    @property
    def holds_every_expert(self) -> bool:
        """Whether the fast tier has a slot for each: then nothing is ever evicted."""
        return self._is_whole(self.scheduler.residency.num_slots)

    def close(self) -> None:
        self.scheduler.close()
        if self.ram is not self.scheduler:
            self.ram.close()

    def _scheduler(self, num_slots: int, mover: Mover, bytes_counter: str) -> Scheduler:
        pools = self.pools
        # A pool with a slot for every expert never evicts: the cheapest policy serves it.
        policy = make_policy(
            LRU.name if self._is_whole(num_slots) else pools.policy,
            num_layers=pools.num_layers,
            num_experts=pools.num_experts,
            num_slots=num_slots,
        )
        residency = Residency(num_slots, policy)
        return Scheduler(residency, mover, num_experts=pools.num_experts, bytes_counter=bytes_counter)

    def _is_whole(self, num_slots: int) -> bool:
        return num_slots >= self.pools.num_layers * self.pools.num_experts

    @contextmanager
    def _borrow(self, key: int) -> Iterator[Tensor]:
        """Lease one record in RAM for as long as the context lasts."""
        layer, expert = divmod(key, self.pools.num_experts)
        with self.ram.acquire(layer, [expert]) as lease:
            for ((_, slot),) in lease:
                yield self.arena.slot(slot)
