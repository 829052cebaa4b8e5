"""The slots of the device while passes of the card decide what is in them.

Between a prompt and the next the pool is lent: the card takes slots for what it misses, and the host's residency
follows by the log of each pass. Anything else that needs a slot recalls it first.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from offload_moe.card.edits import Edits
from offload_moe.card.memory import Allocate
from offload_moe.card.structs import constant, struct
from offload_moe.card.worths import in_groups
from offload_moe.native.constants import FREE, RESIDENT
from offload_moe.residency.hierarchy import Hierarchy
from offload_moe.residency.policy import Appraising

EMPTY, HOSTS = -1, -2  # OM_CARD_EMPTY, OM_CARD_HOSTS
UNKNOWN = -3  # while it is published
FIRST_STAMP = 1  # of what the host brought: older than anything that a pass has used


class CardPool:
    """The device's tables, and what of them has reached the host.

    slot_of, key_of: as published; there may be `num_places` slots: as many as keys, or those of the load.
    tables: `om_card_tables`.
    """

    def __init__(self, hierarchy: Hierarchy, allocate: Allocate) -> None:
        self._hierarchy = hierarchy
        self._scheduler = scheduler = hierarchy.scheduler
        self.num_keys = num_keys = scheduler.keys.total
        self.num_places = num_places = max(num_keys, scheduler.residency.num_slots)
        self.slot_of: NDArray[np.int64] = np.full(num_keys, -1, dtype=np.int64)
        self.key_of: NDArray[np.int64] = np.full(num_places, HOSTS, dtype=np.int64)
        self.num_owned = self.num_slots = 0  # slots of the card; those from `num_slots` on are none
        self._worths: NDArray[np.uint64] = in_groups(np.zeros(num_keys, dtype=np.float32))  # as published
        self._device = [allocate(8 * number) for number in (num_keys, num_keys, *[num_places] * 3)]
        slots, sources, keys, used, memory = self._device
        worth = allocate(self._worths.nbytes)
        self._device.append(worth)
        slots.view(torch.int32).fill_(-1)
        keys.view(torch.int32).fill_(constant("OM_CARD_HOSTS"))
        self._memory = memory
        self._num_resizes = -1
        self.tables = struct("tables")(
            slot_of=slots.data_ptr(),
            key_of=keys.data_ptr(),
            used=used.data_ptr(),
            worth=worth.data_ptr(),
            memory=memory.data_ptr(),
            source=sources.data_ptr(),
        )
        self.is_lent = False

    def lend(self, edits: Edits) -> None:
        """Give the card all slots that nothing is on its way to. Raises: ModelClosed, TransferError."""
        scheduler = self._scheduler
        with scheduler.changed:
            self._settle()
            scheduler.residency.lend()
            table = scheduler.residency.table
            states, keys = np.frombuffer(table.states, np.uint8), np.frombuffer(table.keys, np.int64)
            wanted = np.full(self.num_places, HOSTS, dtype=np.int64)
            wanted[: len(states)][states == FREE] = EMPTY
            wanted[: len(states)][states == RESIDENT] = keys[states == RESIDENT]
            self._place(len(states))
        self._publish(wanted, edits)
        self.is_lent = True

    def publish_worths(self, edits: Edits) -> None:
        """Give the card the worth of each expert by the host's policy, where that has a number for each."""
        policy = self._scheduler.residency.policy
        if not isinstance(policy, Appraising):
            return
        groups = in_groups(policy.worths)
        changed = np.flatnonzero(groups != self._worths)
        edits.add_many("WORTHS", changed, groups[changed])
        self._worths = groups

    def recall(self) -> None:
        """Take the slots back; no pass may be under way, and the log of the last one has been read."""
        if self._scheduler.residency.is_lent:
            with self._scheduler.changed:
                self._scheduler.residency.end_lending()
                self.is_lent = False
                self._scheduler.changed.notify_all()

    def replay(self, changes: Sequence[tuple[int, int, int]]) -> None:
        """Follow a pass: slot, evicted key and admitted key of each change, in their order (lock held)."""
        for slot, evicted, admitted in changes:
            assert self.key_of[slot] == evicted, (slot, evicted, admitted)
            if evicted >= 0:
                self.slot_of[evicted] = -1
            self.key_of[slot], self.slot_of[admitted] = admitted, slot
            self._scheduler.residency.exchange(slot, admitted)

    def read_back(self, slot_of: Sequence[int]) -> None:
        """After a pass that was given up: the slots of all keys as the device has them (lock held)."""
        for key, slot in enumerate(slot_of if self.is_lent else ()):
            if slot >= 0 and self.key_of[slot] != key:
                self.replay([(slot, int(self.key_of[slot]), key)])

    def _place(self, num_slots: int) -> None:
        """Write where the slots are, once the pool has been resized; no pass is under way."""
        if self._num_resizes != self._hierarchy.num_resizes:
            self._num_resizes = self._hierarchy.num_resizes
            addresses = [self._hierarchy.record_of(slot).data_ptr() for slot in range(num_slots)]
            self._memory.view(torch.int64)[:num_slots] = torch.tensor(addresses, dtype=torch.int64)

    def _settle(self) -> None:
        """Wait for what is on its way, and for leases (lock held)."""
        scheduler = self._scheduler
        scheduler.drain_completions()
        left_s = scheduler.stall_limit_s
        while not scheduler.residency.is_quiet and left_s > 0:
            left_s -= scheduler.wait(left_s)
        if left_s <= 0:
            raise scheduler.late("Copies of experts to the device")

    def _publish(self, wanted: NDArray[np.int64], edits: Edits) -> None:
        """Edit the tables where they differ; everywhere, behind an interrupt within."""
        slots = np.flatnonzero(wanted >= 0)
        slot_of = np.full(self.num_keys, -1, dtype=np.int64)
        slot_of[wanted[slots]] = slots
        keys, changed = np.flatnonzero(slot_of != self.slot_of), np.flatnonzero(wanted != self.key_of)
        self.slot_of[:], self.key_of[:] = UNKNOWN, UNKNOWN
        for key, slot in zip(keys.tolist(), slot_of[keys].tolist(), strict=True):
            edits.add("SLOT_OF", slot, key)
        for slot, key in zip(changed.tolist(), wanted[changed].tolist(), strict=True):
            edits.add("KEY_OF", key, slot)
            edits.add("USED", FIRST_STAMP if key >= 0 else 0, slot)
        owned = np.flatnonzero(wanted != HOSTS)
        self.num_owned, self.num_slots = len(owned), int(owned[-1]) + 1 if len(owned) else 0
        edits.add("OWNED", self.num_owned)
        edits.add("SLOTS", self.num_slots)
        self.slot_of[:], self.key_of[:] = slot_of, wanted
