"""Which expert is in which slot of one pool. Pure Python: no bytes, no torch, no threads.

A slot is FREE, LOADING or RESIDENT, and counts its leases:

    FREE --admit--> LOADING --loaded--> RESIDENT --evict--> FREE
                       |                                      ^
                       +----------------abandon---------------+

A leased slot is never evicted. A LOADING slot is never evicted either: its bytes are on the way.
"""

from collections.abc import Collection
from enum import IntEnum

from offload_moe.schedule.policy import Policy


class SlotState(IntEnum):
    FREE = 0
    LOADING = 1
    RESIDENT = 2


class Residency:
    """The slots of one pool. The caller serializes access (the scheduler holds a lock).

    Keys are ``layer * num_experts + expert``; slots are ``0 .. num_slots - 1``.
    """

    def __init__(self, num_slots: int, policy: Policy) -> None:
        if num_slots < 1:
            raise ValueError(f"a pool needs at least one slot, got {num_slots}")
        self.policy = policy
        self.num_evictions = 0
        self._slot_of: dict[int, int] = {}
        self._key_of = [-1] * num_slots
        self._state = [SlotState.FREE] * num_slots
        self._num_leases = [0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # pop() hands out slot 0 first

    @property
    def num_slots(self) -> int:
        return len(self._key_of)

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

    def lease(self, slot: int) -> None:
        """Protect a LOADING or RESIDENT slot from eviction until `release`."""
        assert self._state[slot] is not SlotState.FREE
        self._num_leases[slot] += 1

    def release(self, slot: int) -> None:
        assert self._num_leases[slot] > 0
        self._num_leases[slot] -= 1

    def admit(self, key: int, keep: Collection[int] = ()) -> int | None:
        """Take a free slot for `key`, or evict the least valuable unleased expert for it, but none of `keep`.

        Returns the slot, now LOADING and unleased; None when every slot is leased, loading or kept.
        """
        assert key not in self._slot_of
        if not self._free and not self._evict_one(keep):
            return None
        slot = self._free.pop()
        self._slot_of[key] = slot
        self._key_of[slot] = key
        self._state[slot] = SlotState.LOADING
        return slot

    def loaded(self, slot: int) -> None:
        """The bytes have arrived: LOADING -> RESIDENT."""
        assert self._state[slot] is SlotState.LOADING
        self._state[slot] = SlotState.RESIDENT
        self.policy.insert(self._key_of[slot])

    def abandon(self, slot: int) -> None:
        """The transfer failed: LOADING -> FREE, once nobody leases it."""
        assert self._state[slot] is SlotState.LOADING
        assert self._num_leases[slot] == 0
        self._vacate(slot)

    def _evict_one(self, keep: Collection[int]) -> bool:
        spared = (lambda key: key in keep or self._is_leased(key)) if keep else self._is_leased
        victim = self.policy.victim(spared)
        if victim is None:
            return False
        slot = self._slot_of[victim]
        assert self._state[slot] is SlotState.RESIDENT
        assert self._num_leases[slot] == 0
        self.policy.remove(victim)
        self._vacate(slot)
        self.num_evictions += 1
        return True

    def _is_leased(self, key: int) -> bool:
        return self._num_leases[self._slot_of[key]] > 0

    def _vacate(self, slot: int) -> None:
        del self._slot_of[self._key_of[slot]]
        self._key_of[slot] = -1
        self._state[slot] = SlotState.FREE
        self._free.append(slot)
