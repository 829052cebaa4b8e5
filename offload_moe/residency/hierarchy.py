"""The tiers of one model: disk -> RAM, and RAM -> device when there is one."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from offload_moe.memory.arena import CHUNK_BYTES, Arena, whole_chunks
from offload_moe.memory.copier import Copier, DeviceMemory
from offload_moe.memory.device import DeviceMover, DeviceSlots
from offload_moe.memory.disk import DiskMover
from offload_moe.memory.flights import Flights
from offload_moe.memory.mover import Mover
from offload_moe.memory.pace import LinkPace
from offload_moe.native import kernels
from offload_moe.residency.counters import Counters
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import DEFAULT_POLICY, Policy, policy_of_pool
from offload_moe.residency.records import RamRecords
from offload_moe.residency.reserved import PassAccounts, ReservedSlots
from offload_moe.residency.residency import Residency
from offload_moe.residency.scheduler import Scheduler
from offload_moe.system.lifecycle import Lifecycle

Tier = Literal["ram", "vram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """The slots that each tier begins with. Without a device tier, RAM is the fast tier and `num_device_slots` is 0."""

    keys: ExpertKeys
    slot_bytes: int
    num_ram_slots: int
    num_device_slots: int = 0
    policy: str = DEFAULT_POLICY
    chunk_bytes: int = CHUNK_BYTES  # of memory that is allocated, locked and returned as one


MakeMover = Callable[[Arena, kernels.SlotTable], Mover]


class Hierarchy:
    """The tiers of one model.

    Layers acquire experts from `scheduler`, which is the fast tier; `record_of` gives the bytes in one of its slots.
    """

    def __init__(self, pools: Pools, make_mover: MakeMover, copier: Copier | None = None) -> None:
        """make_mover: for the mover that fills the RAM arena, usually from disk. copier: of RAM slots to the device."""
        self.pools = pools
        self.lifecycle = Lifecycle()
        self.arena = Arena(pools.num_ram_slots, pools.slot_bytes, pools.chunk_bytes)
        self._resizing = threading.Lock()
        self.num_resizes = 0  # after which slots may lie elsewhere
        self._began_whole: set[Scheduler] = set()  # the tiers that were given a slot for every expert
        self._copier = copier if pools.num_device_slots else None
        self.before_release: list[
            Callable[[], None]
        ] = []  # called when the model is closed, before its memory is freed
        self.before_counters: Callable[[], None] | None = None  # enters what has not been counted yet
        self._reserved: ReservedSlots | None = None
        self._pass_reads: kernels.Reads | None = None
        ram_table = kernels.SlotTable(self._num_keys, pools.num_ram_slots, self.arena.addresses)
        self.slot_table = ram_table if self._copier is None else None  # of the fast tier, for token passes
        mover = make_mover(self.arena, ram_table)
        changed = mover.changed if isinstance(mover, DiskMover) else None
        self.ram = self._scheduler(ram_table, mover, "disk_bytes", changed=changed)
        self.scheduler = self.ram
        self.record_of: Callable[[int], Tensor] = self.arena.slot
        if self._copier is not None:
            self._device_slots = DeviceSlots(
                self._copier, pools.num_device_slots, self.arena.slot_bytes, pools.chunk_bytes
            )
            records = RamRecords(self.ram, self.arena)
            self._device_mover = DeviceMover(self._copier, self._device_slots, records)
            flights = self._device_mover.flights
            device_table = kernels.SlotTable(self._num_keys, pools.num_device_slots)
            self.scheduler = self._scheduler(device_table, self._device_mover, "h2d_bytes", flights=flights)
            self.ram.count_bytes_in(self.scheduler.counters)
            self.ram.acquires_name_layers = False  # the device's loaders acquire one expert at a time
            self.record_of = self._device_slots.slot

    def reserved(self) -> ReservedSlots | None:
        """The slots that token passes fetch experts into; None where Python fetches all."""
        mover = self.ram.mover
        if self._reserved is None and self.slot_table is not None and isinstance(mover, DiskMover):
            try:
                self._pass_reads = mover.read_passes(PassAccounts(self.ram))
            except OSError:
                return None  # the read of an expert raises an error that names the file
            self.ram.reserved = self._reserved = ReservedSlots(self.ram, self._pass_reads)
        return self._reserved

    @property
    def pass_reads(self) -> kernels.Reads | None:
        """The reader with which token passes fetch; None where `reserved` is."""
        return self._pass_reads

    @property
    def counters(self) -> Counters:
        """Running totals: hits and stalls of the fast tier, bytes of every tier."""
        if self.before_counters is not None:
            self.before_counters()
        return self.scheduler.counters

    @property
    def holds_every_expert(self) -> bool:
        """Whether the fast tier has a slot for each expert: then nothing is ever evicted."""
        return self._is_whole(self.scheduler.residency.num_slots)

    def hold_every_expert(self) -> bool:
        """Whether every expert is resident in the fast tier; if so, all of them stay until `release_every_expert`."""
        assert self.slot_table is not None
        with self.scheduler.changed:
            are_here = self.scheduler.residency.num_resident == self._num_keys
            if are_here:
                self.slot_table.hold_all()
        return are_here

    def release_every_expert(self) -> None:
        """End one `hold_every_expert`."""
        assert self.slot_table is not None
        with self.scheduler.changed:
            self.slot_table.release_all_holds()
            self.scheduler.changed.notify_all()

    @property
    def _num_keys(self) -> int:
        return self.pools.keys.total

    @property
    def link(self) -> LinkPace:
        """The recent cost of copies to the device; only with a device tier."""
        return self._device_mover.pace

    def device_memory(self) -> DeviceMemory:
        """What the device has for this process now; only with a device tier."""
        assert self._copier is not None
        return self._copier.memory()

    def is_direct(self, slot: int) -> bool:
        """Whether the device can read a RAM slot itself, which is tried; only with a device tier."""
        assert self._copier is not None
        return self._copier.is_direct(self.arena.slot(slot))

    def num_slots(self, tier: Tier) -> int:
        """Present slots of a tier; 0 VRAM slots without a device tier."""
        if tier == "ram":
            return self.ram.residency.num_slots
        return self.scheduler.residency.num_slots if self._copier is not None else 0

    def resize(self, tier: Tier, num_slots: int) -> int:
        """Shrink or grow a tier to `num_slots` slots. Returns the slots that it has now.

        Memory that the device uses is resized by chunks, so fewer slots than `num_slots` may be left, but not fewer
        than the first chunk has. Leases on the slots that are given up are waited for: call it between forwards, or
        from another thread than the one that holds a lease. Experts in these slots are evicted.

        Raises:
            TransferError: slots to be given up are still in use after the scheduler's limit; nothing has changed.
            BudgetError: the system or the device refuses the memory to grow by; nothing has changed.
            ModelClosed: the model is closed.
        """
        with self.lifecycle, self._resizing:
            return self._resize(tier, num_slots)

    def close(self) -> None:
        """Wait for passes in flight, stop all threads, close files, free the slots. A second call does nothing."""
        self.lifecycle.end(self._release)

    def _release(self) -> None:
        for end in self.before_release:
            end()
        self.scheduler.close()
        if self.ram is not self.scheduler:
            self.ram.close()
            self._device_mover.wait_for_readers(range(self._device_slots.num_slots))
            self._device_slots.shrink(0)
        self.arena.shrink(0)

    def _resize(self, tier: Tier, num_slots: int) -> int:
        pool = self._device_slots if tier == "vram" else self.arena
        scheduler = self.scheduler if tier == "vram" else self.ram
        num_slots = max(1, min(num_slots, self._num_keys))
        if self._copier is not None:
            num_slots = whole_chunks(pool.chunk_sizes, num_slots)
        num_before = pool.num_slots
        self.num_resizes += 1
        if num_slots > num_before:
            pool.grow(num_slots)
            scheduler.grow(num_slots)
        elif num_slots < num_before:
            scheduler.shrink(num_slots)
            self._settle(tier, num_slots, num_before)
            pool.shrink(num_slots)
            if self._copier is not None and tier == "vram":
                self._copier.return_freed()
        self._refit_policy(scheduler, num_before)
        return num_slots

    def _settle(self, tier: Tier, num_slots: int, num_before: int) -> None:
        """Wait until the device's compute has read the slots that are given up, or unlock their chunks."""
        if tier == "vram":
            self._device_mover.wait_for_readers(range(num_slots, num_before))
        elif self._copier is not None:
            for chunk in self.arena.chunks_behind(num_slots):
                self._copier.unlock(chunk)

    def _scheduler(
        self,
        table: kernels.SlotTable,
        mover: Mover,
        bytes_counter: str,
        flights: Flights | None = None,
        changed: threading.Condition | None = None,
    ) -> Scheduler:
        scheduler = Scheduler(
            Residency(table, self._policy(table.num_slots)),
            mover,
            keys=self.pools.keys,
            bytes_counter=bytes_counter,
            changed=changed,
            flights=flights,
            lifecycle=self.lifecycle,
        )
        if self._is_whole(table.num_slots):
            self._began_whole.add(scheduler)
        return scheduler

    def _refit_policy(self, scheduler: Scheduler, num_before: int) -> None:
        """Change between none and a policy that chooses, in a pool that began with a slot for every expert.

        Any other pool keeps its policy with what it has learned, also while borrowed slots make it hold every expert.
        """
        now = scheduler.residency.num_slots
        if scheduler in self._began_whole and self._is_whole(num_before) != self._is_whole(now):
            scheduler.use_policy(self._policy(now))

    def _policy(self, num_slots: int) -> Policy:
        pools = self.pools
        return policy_of_pool(pools.policy, pools.keys, num_slots=num_slots, on_fault=self.lifecycle.fail)

    def _is_whole(self, num_slots: int) -> bool:
        return num_slots >= self._num_keys
