"""Records in RAM that the card reads itself: which have an address there.

A published record is leased in the RAM tier until the card has seen that it is gone, so that its slot is not reused
while a pass may read it.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from offload_moe.card.edits import Edits
from offload_moe.memory.arena import Arena
from offload_moe.native.constants import RESIDENT
from offload_moe.native.session import Session
from offload_moe.residency.scheduler import Scheduler

SPARE_SHARE = 8  # one RAM slot in so many is not published, so that reads from disk have slots
LEAST_SPARE = 4


class Sources:
    """Safe for one thread at a time.

    is_published: by key.
    """

    def __init__(self, ram: Scheduler, arena: Arena, is_locked: Callable[[int], bool], session: Session) -> None:
        """is_locked: whether a RAM slot is page-locked, which it is tried to be."""
        self._ram, self._arena, self._is_locked, self._session = ram, arena, is_locked, session
        self._slot_of: dict[int, int] = {}  # published keys, the oldest first
        self._num_seen = -1  # records that were resident at the last look
        self._ending: list[int] = []  # slots whose leases end once their edits are applied
        self.is_published: NDArray[np.bool_] = np.zeros(ram.keys.total, dtype=np.bool_)

    @property
    def _most(self) -> int:
        residency = self._ram.residency
        if residency.num_slots >= self._ram.keys.total:
            return residency.num_slots
        return max(0, residency.num_slots - max(LEAST_SPARE, residency.num_slots // SPARE_SHARE))

    def publish(self, edits: Edits, wanted: tuple[int, ...] = ()) -> None:
        """Publish what is resident, as far as it may be, and these keys before others."""
        if not wanted and self._ram.residency.num_resident == self._num_seen:
            return
        with self._ram.changed:
            self._ram.drain_completions()
            self._num_seen = self._ram.residency.num_resident
            table = self._ram.residency.table
            states = np.frombuffer(table.states, dtype=np.uint8)
            keys = np.frombuffer(table.keys, dtype=np.int64)[states == RESIDENT]
            new = [key for key in keys[~self.is_published[keys]].tolist() if key not in wanted]
            here = [key for key in wanted if not self.is_published[key] and self._is_here(key)][: self._most]
            surplus = len(self._slot_of) + len(here) - self._most
            if surplus > 0:
                self._withdraw([*self._slot_of][:surplus], edits)
            room = max(0, self._most - len(self._slot_of) - len(here))
            for key in [*here, *new[:room]]:
                self._publish(key, table.slots[key], edits)

    def withdraw_all(self, edits: Edits) -> None:
        """Let the RAM tier have its slots, once the edits are applied."""
        self._withdraw([*self._slot_of], edits)

    def withdraw_for(self, num_slots: int, edits: Edits) -> None:
        """Let so many RAM slots be without a lease of ours, once the edits are applied."""
        surplus = len(self._slot_of) + num_slots - self._ram.residency.num_slots
        if surplus > 0:
            self._withdraw([*self._slot_of][:surplus], edits)

    def applied(self) -> None:
        """The edits have been applied: end the leases of what is not published any more."""
        if self._ending:
            with self._ram.changed:
                ending, self._ending = self._ending, []
                self._ram.release(ending)

    def close(self) -> None:
        """End all leases; no pass runs any more."""
        self._ending += self._slot_of.values()
        self._slot_of.clear()
        self.is_published[:] = False
        self.applied()

    def _is_here(self, key: int) -> bool:
        slot = self._ram.residency.find(key)
        return slot is not None and self._ram.residency.is_resident(slot)

    def _publish(self, key: int, slot: int, edits: Edits) -> None:
        if not self._is_locked(slot):
            return
        address = self._session.address_of(self._arena.slot(slot).data_ptr())
        if address:
            if key not in self._slot_of:
                self._ram.residency.lease(slot)
                self._slot_of[key] = slot
            edits.add("SOURCE", address, key)
            self.is_published[key] = True

    def _withdraw(self, keys: list[int], edits: Edits) -> None:
        for key in keys:
            self.is_published[key] = False
            edits.add("SOURCE", 0, key)  # before its lease may end, wherever an interrupt comes
            self._ending.append(self._slot_of.pop(key))
