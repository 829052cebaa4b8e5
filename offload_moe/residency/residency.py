"""The slots of one pool: admits, evicts and leases experts. No bytes, no torch, no threads.

    FREE --admit--> LOADING --loaded--> RESIDENT --evict--> FREE
                       |                                      ^
                       +----------------abandon---------------+

The states are those of the slot table, which native readers and token passes change, too; their changes are entered
here when completions are drained. A leased slot is never evicted. A LOADING slot is never evicted either:
its bytes are on the way.

The pool shrinks from its end: closed slots take no more experts, and are given up once all of them are FREE.
"""

from collections.abc import Collection, Iterator
from enum import IntEnum

from offload_moe.native import constants
from offload_moe.native.constants import ARRIVED, FREE, LOADING, RESERVED, RESIDENT
from offload_moe.native.slot_table import SlotTable
from offload_moe.residency.policy import Policy


class SlotState(IntEnum):
    """States of a slot as Python sees them: ARRIVED counts as LOADING."""

    FREE = constants.FREE
    LOADING = constants.LOADING
    RESIDENT = constants.RESIDENT
    RESERVED = constants.RESERVED


class Residency:
    """The slots of one pool. The caller serializes access (the scheduler holds a lock).

    Keys are those of an `ExpertKeys`; slots are ``0 .. num_slots - 1``.
    """

    def __init__(self, table: SlotTable, policy: Policy) -> None:
        """table: with at least one slot, all FREE. Raises: ValueError."""
        if table.num_slots < 1:
            raise ValueError(f"a pool needs at least one slot, got {table.num_slots}")
        self.policy = policy
        self.num_evictions = 0
        self.num_resident = 0
        self.num_reserved = 0  # slots that are reserved and not being filled, as far as completions are drained
        self.table = table
        self._slot_of = table.slots
        self._num_leases = [0] * table.num_slots
        self._free = list(range(table.num_slots - 1, -1, -1))  # pop() hands out slot 0 first
        self._num_open = table.num_slots
        self.is_lent = False

    @property
    def num_slots(self) -> int:
        """Slots of the pool, closed ones included."""
        return len(self._num_leases)

    @property
    def num_free(self) -> int:
        """Open slots that are FREE."""
        return len(self._free)

    def find(self, key: int) -> int | None:
        """The slot that holds `key` or is loading it."""
        slot = self._slot_of[key]
        return None if slot < 0 else slot

    def is_resident(self, slot: int) -> bool:
        """Whether the slot is RESIDENT."""
        return self.table.states[slot] == RESIDENT

    def state(self, slot: int) -> SlotState:
        """The state of a slot: LOADING until its arrival is entered."""
        state = self.table.states[slot]
        return SlotState.LOADING if state == ARRIVED else SlotState(state)

    def num_leases(self, slot: int) -> int:
        """Leases on the slot, without those of token passes."""
        return self._num_leases[slot]

    def resident_keys(self) -> list[int]:
        """Keys of RESIDENT slots, by slot."""
        table = self.table
        return [key for key, state in zip(table.keys, table.states, strict=True) if state == RESIDENT]

    def states(self) -> Iterator[tuple[int, SlotState]]:
        """Each expert that has a slot, and whether it is resident or loading."""
        return ((key, self.state(slot)) for key, slot in enumerate(self._slot_of) if slot >= 0)

    def lease(self, slot: int) -> None:
        """Protect a LOADING or RESIDENT slot from eviction until `release`."""
        assert self.table.keys[slot] >= 0
        self._num_leases[slot] += 1

    def release(self, slot: int) -> None:
        """End one lease."""
        assert self._num_leases[slot] > 0
        self._num_leases[slot] -= 1

    def lease_all(self, keys: Collection[int]) -> list[int] | None:
        """Lease the slots of these keys if all are RESIDENT; else None, and nothing has changed."""
        slots: list[int] = []
        slot_of, states = self._slot_of, self.table.states
        for key in keys:
            slot = slot_of[key]
            if slot < 0 or states[slot] != RESIDENT:
                return None
            slots.append(slot)
        for slot in slots:
            self._num_leases[slot] += 1
        return slots

    def release_all(self, slots: Collection[int]) -> None:
        """End one lease on each slot."""
        for slot in slots:
            assert self._num_leases[slot] > 0
            self._num_leases[slot] -= 1

    def admit(self, key: int, keep: Collection[int] = ()) -> int | None:
        """Take a free slot for `key`, or evict the least valuable unleased expert for it, but none of `keep`.

        Returns the slot, now LOADING and unleased; None when every slot is leased, loading, reserved or kept, or when a
        token pass has begun to read the expert.
        """
        if self.is_lent or (not self._free and not self._evict_one(keep)):
            return None
        if not self.table.admit(key, self._free[-1]):
            return None
        return self._free.pop()

    def reserve(self, *, may_evict: bool) -> int | None:
        """Reserve a slot for the reader of token passes; None if none is free or evictable."""
        if self.is_lent or (not self._free and not (may_evict and self._evict_one(()))):
            return None
        slot = self._free.pop()
        self.table.reserve(slot)
        self.num_reserved += 1
        return slot

    def reclaim(self, slot: int) -> None:
        """Free a reserved slot: RESERVED -> FREE."""
        assert self.table.states[slot] == RESERVED
        self.num_reserved -= 1
        self._vacate(slot)

    def loaded(self, slot: int) -> None:
        """Enter that the bytes have arrived: LOADING -> RESIDENT."""
        assert self.state(slot) is SlotState.LOADING
        self.table.loaded(slot)
        self.num_resident += 1
        self.policy.insert(self.table.keys[slot])

    def abandon(self, slot: int) -> None:
        """Enter that the transfer has failed: LOADING -> FREE. The slot must not be leased."""
        assert self.table.states[slot] == LOADING
        assert self._num_leases[slot] == 0
        self._vacate(slot)

    @property
    def is_quiet(self) -> bool:
        """Whether no slot is leased or being filled."""
        states = self.table.states
        return LOADING not in states and ARRIVED not in states and not any(self._num_leases)

    def lend(self) -> None:
        """Let a device decide what is in the slots: until `end_lending` they change by `exchange` alone."""
        self.is_lent = True

    def end_lending(self) -> None:
        self.is_lent = False

    def exchange(self, slot: int, key: int) -> None:
        """Enter that the device has put another expert into a slot, which was FREE or RESIDENT."""
        assert self.is_lent
        evicted = self.table.keys[slot]
        if evicted >= 0:
            is_vacated = self._evict(slot)
            assert is_vacated
        self._free.remove(slot)
        is_admitted = self.table.admit(key, slot)
        assert is_admitted
        self.loaded(slot)

    def close_slots(self, first: int) -> None:
        """Admit no expert to slots from `first` on until they are opened again. At least one stays open."""
        assert 1 <= first <= self._num_open
        self._num_open = first
        self._free = [slot for slot in self._free if slot < first]

    def empty_closed_slots(self) -> bool:
        """Evict experts that are not leased from the closed slots. Returns whether all of them are FREE now."""
        for slot in range(self._num_open, self.num_slots):
            if self.is_resident(slot) and not self._num_leases[slot]:
                self._evict(slot)
        return not any(self.table.states[self._num_open :])

    def open_slots(self) -> None:
        """Open the closed slots again, in whatever state they are."""
        closed = range(self._num_open, self.num_slots)
        self._free += [slot for slot in closed if self.table.states[slot] == FREE]
        self._num_open = self.num_slots

    def cut(self) -> None:
        """Give up the closed slots; all of them must be FREE."""
        assert not any(self.table.states[self._num_open :])
        del self._num_leases[self._num_open :]
        self.table.resize(self.num_slots)
        self.policy.resize(self.num_slots)

    def grow(self, num_slots: int) -> None:
        """Append FREE slots until there are `num_slots`. None may be closed."""
        added = range(self.num_slots, num_slots)
        assert self._num_open == self.num_slots <= num_slots
        self.table.resize(num_slots)
        self._num_leases += [0 for _ in added]
        self._free += added
        self._num_open = num_slots
        self.policy.resize(num_slots)

    def use_policy(self, policy: Policy) -> None:
        """Replace the policy; resident experts are inserted into the new one."""
        for key in self.resident_keys():
            policy.insert(key)
        self.policy = policy

    def _evict_one(self, keep: Collection[int]) -> bool:
        refused: set[int] = set()  # leased by a token pass after they were chosen

        def is_spared(key: int) -> bool:
            return key in keep or key in refused or self._must_stay(key)

        while (victim := self.policy.victim(is_spared)) is not None:
            if self._evict(self._slot_of[victim]):
                return True
            refused.add(victim)
        return False

    def _evict(self, slot: int) -> bool:
        """Evict the expert of a slot. Returns False where a token pass has leased it meanwhile."""
        assert self.is_resident(slot)
        assert self._num_leases[slot] == 0
        key = self.table.keys[slot]
        if self.table.is_leased(key) or not self._vacate(slot):
            return False
        self.policy.remove(key)
        self.num_evictions += 1
        self.num_resident -= 1
        return True

    def _must_stay(self, key: int) -> bool:
        """Whether an expert is leased, or in a closed slot, whose eviction makes no room."""
        slot = self._slot_of[key]
        return self._num_leases[slot] > 0 or self.table.is_leased(key) or slot >= self._num_open

    def _vacate(self, slot: int) -> bool:
        if not self.table.vacate(slot):
            return False
        if slot < self._num_open:
            self._free.append(slot)
        return True
