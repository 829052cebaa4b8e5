"""Which expert is in which slot of one pool. Pure Python: no bytes, no torch, no threads.

A slot is FREE, LOADING or RESIDENT, and counts its leases:

    FREE --admit--> LOADING --loaded--> RESIDENT --evict--> FREE
                       |                                      ^
                       +----------------abandon---------------+

A leased slot is never evicted. A LOADING slot is never evicted either: its bytes are on the way.

Compute that chooses among the resident experts without asking has a `Lookup`, in which it leases by itself.

The pool shrinks from its end: closed slots take no expert any more, and are given up once the last of them is FREE.
"""

from collections.abc import Collection, Iterator
from enum import IntEnum
from typing import Protocol

from offload_moe.residency.policy import Policy


class SlotState(IntEnum):
    FREE = 0
    LOADING = 1
    RESIDENT = 2


class Lookup(Protocol):
    """Where other threads find what is resident; theirs are the leases counted there."""

    def claim(self, key: int) -> bool:
        """The expert is on its way; False, and nothing changed, where it is already, or resident."""

    def publish(self, key: int, slot: int) -> None:
        """The expert is resident in this slot."""

    def withdraw(self, key: int) -> bool:
        """The expert is gone; False, and nothing changed, where it is leased there."""

    def is_leased(self, key: int) -> bool: ...


class Residency:
    """The slots of one pool. The caller serializes access (the scheduler holds a lock).

    Keys are those of an `ExpertKeys`; slots are ``0 .. num_slots - 1``.
    """

    def __init__(self, num_slots: int, policy: Policy, lookup: Lookup | None = None) -> None:
        if num_slots < 1:
            raise ValueError(f"a pool needs at least one slot, got {num_slots}")
        self.policy = policy
        self.num_evictions = 0
        self.num_resident = 0
        self.lookup = lookup
        self._slot_of: dict[int, int] = {}
        self._key_of = [-1] * num_slots
        self._state = [SlotState.FREE] * num_slots
        self._num_leases = [0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # pop() hands out slot 0 first
        self._num_open = num_slots
        self._reserved: set[int] = set()

    @property
    def num_reserved(self) -> int:
        """Slots that are reserved and not being filled, as far as is known here."""
        return len(self._reserved)

    @property
    def num_slots(self) -> int:
        """Slots there are, closed ones included."""
        return len(self._key_of)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def find(self, key: int) -> int | None:
        """The slot that holds `key` or is loading it."""
        return self._slot_of.get(key)

    def is_resident(self, slot: int) -> bool:
        return self._state[slot] is SlotState.RESIDENT

    def state(self, slot: int) -> SlotState:
        return self._state[slot]

    def num_leases(self, slot: int) -> int:
        return self._num_leases[slot]

    def resident_keys(self) -> list[int]:
        return [key for key, slot in self._slot_of.items() if self._state[slot] is SlotState.RESIDENT]

    def states(self) -> Iterator[tuple[int, SlotState]]:
        """Each expert that has a slot, and whether it is resident or loading."""
        return ((key, self._state[slot]) for key, slot in self._slot_of.items())

    def lease(self, slot: int) -> None:
        """Protect a LOADING or RESIDENT slot from eviction until `release`."""
        assert self._state[slot] is not SlotState.FREE
        self._num_leases[slot] += 1

    def release(self, slot: int) -> None:
        assert self._num_leases[slot] > 0
        self._num_leases[slot] -= 1

    def lease_all(self, keys: Collection[int]) -> list[int] | None:
        """Lease the slots of these keys if all are RESIDENT; else None, and nothing changed."""
        slots: list[int] = []
        for key in keys:
            slot = self._slot_of.get(key)
            if slot is None or self._state[slot] is not SlotState.RESIDENT:
                return None
            slots.append(slot)
        for slot in slots:
            self._num_leases[slot] += 1
        return slots

    def release_all(self, slots: Collection[int]) -> None:
        for slot in slots:
            assert self._num_leases[slot] > 0
            self._num_leases[slot] -= 1

    def admit(self, key: int, keep: Collection[int] = ()) -> int | None:
        """Take a free slot for `key`, or evict the least valuable unleased expert for it, but none of `keep`.

        Returns the slot, now LOADING and unleased; None when every slot is leased, loading, reserved or kept.
        """
        assert key not in self._slot_of
        if not self._free and not self._evict_one(keep):
            return None
        if self.lookup is not None and not self.lookup.claim(key):
            return None  # a run is fetching it
        slot = self._free.pop()
        self._begin(key, slot)
        return slot

    def reserve(self, *, may_evict: bool) -> int | None:
        """Set a slot aside that whoever has the lookup fills by himself; None where none can be had."""
        if not self._free and not (may_evict and self._evict_one(())):
            return None
        slot = self._free.pop()
        self._reserved.add(slot)
        return slot

    def admit_reserved(self, key: int, slot: int) -> None:
        """A reserved slot is being filled: LOADING, and nobody's lease."""
        self._reserved.remove(slot)
        self._begin(key, slot)

    def reserve_again(self, slot: int) -> None:
        """What was filling a reserved slot is not coming; the lookup knows."""
        assert self._state[slot] is SlotState.LOADING
        del self._slot_of[self._key_of[slot]]
        self._key_of[slot] = -1
        self._state[slot] = SlotState.FREE
        self._reserved.add(slot)

    def reclaim(self, slot: int) -> None:
        """A reserved slot is FREE again."""
        self._reserved.remove(slot)
        if slot < self._num_open:
            self._free.append(slot)

    def loaded(self, slot: int) -> None:
        """The bytes have arrived: LOADING -> RESIDENT."""
        assert self._state[slot] is SlotState.LOADING
        self._state[slot] = SlotState.RESIDENT
        self.num_resident += 1
        if self.lookup is not None:
            self.lookup.publish(self._key_of[slot], slot)
        self.policy.insert(self._key_of[slot])

    def abandon(self, slot: int) -> None:
        """The transfer failed: LOADING -> FREE, once nobody leases it."""
        assert self._state[slot] is SlotState.LOADING
        assert self._num_leases[slot] == 0
        if self.lookup is not None:
            self.lookup.withdraw(self._key_of[slot])
        self._vacate(slot)

    def close_slots(self, first: int) -> None:
        """No expert is admitted to slots from `first` on until they are opened again. At least one stays open."""
        assert 1 <= first <= self._num_open
        self._num_open = first
        self._free = [slot for slot in self._free if slot < first]

    def empty_closed_slots(self) -> bool:
        """Evict what nobody leases from the closed slots. Returns whether all of them are FREE now."""
        for slot in range(self._num_open, self.num_slots):
            if self.is_resident(slot) and not self._num_leases[slot]:
                self._evict(slot)
        is_reserved = any(slot >= self._num_open for slot in self._reserved)
        return not is_reserved and all(state is SlotState.FREE for state in self._state[self._num_open :])

    def open_slots(self) -> None:
        """Closed slots take experts again, whatever became of them meanwhile."""
        closed = range(self._num_open, self.num_slots)
        self._free += [slot for slot in closed if self._state[slot] is SlotState.FREE and slot not in self._reserved]
        self._num_open = self.num_slots

    def cut(self) -> None:
        """Give up the closed slots; all of them must be FREE."""
        assert all(state is SlotState.FREE for state in self._state[self._num_open :])
        for column in (self._key_of, self._state, self._num_leases):
            del column[self._num_open :]
        self.policy.resize(self.num_slots)

    def grow(self, num_slots: int) -> None:
        """Append FREE slots until there are `num_slots`. None may be closed."""
        added = range(self.num_slots, num_slots)
        assert self._num_open == self.num_slots <= num_slots
        self._key_of += [-1 for _ in added]
        self._state += [SlotState.FREE for _ in added]
        self._num_leases += [0 for _ in added]
        self._free += added
        self._num_open = num_slots
        self.policy.resize(num_slots)

    def use_policy(self, policy: Policy) -> None:
        """Let another policy decide from now on; it is told what is resident."""
        for key in self.resident_keys():
            policy.insert(key)
        self.policy = policy

    def _begin(self, key: int, slot: int) -> None:
        self._slot_of[key] = slot
        self._key_of[slot] = key
        self._state[slot] = SlotState.LOADING

    def _evict_one(self, keep: Collection[int]) -> bool:
        refused: set[int] = set()  # leased in the lookup since they were chosen

        def is_spared(key: int) -> bool:
            return key in keep or key in refused or self._must_stay(key)

        while (victim := self.policy.victim(is_spared)) is not None:
            if self._evict(self._slot_of[victim]):
                return True
            refused.add(victim)
        return False

    def _evict(self, slot: int) -> bool:
        """False where it has been leased in the lookup meanwhile."""
        assert self._state[slot] is SlotState.RESIDENT
        assert self._num_leases[slot] == 0
        if self.lookup is not None and not self.lookup.withdraw(self._key_of[slot]):
            return False
        self.policy.remove(self._key_of[slot])
        self._vacate(slot)
        self.num_evictions += 1
        self.num_resident -= 1
        return True

    def _must_stay(self, key: int) -> bool:
        """Whether it is leased, or in a closed slot, which would make no room."""
        slot = self._slot_of[key]
        is_leased = self._num_leases[slot] > 0 or (self.lookup is not None and self.lookup.is_leased(key))
        return is_leased or slot >= self._num_open

    def _vacate(self, slot: int) -> None:
        del self._slot_of[self._key_of[slot]]
        self._key_of[slot] = -1
        self._state[slot] = SlotState.FREE
        if slot < self._num_open:
            self._free.append(slot)
