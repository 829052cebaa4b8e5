"""Slots of a tier that native token passes fill: reserved in advance, accounted for when completions are drained.

A pass decides only what it fetches. Evictions happen when a slot is reserved.
"""

import weakref
from collections.abc import Sequence
from typing import Protocol

from offload_moe.memory.mover import Arrived
from offload_moe.residency.tier import Tier

SLOTS_PER_CHOICE = 2  # that a pass needs: for a layer's experts, and for those of a layer that another thread computes
SLOTS_PER_RESERVATION = 24  # one slot in this many is reserved, and empty until a pass needs it
MOST_RESERVED = 12


class SpareSlots(Protocol):
    """The part of a reader (`memory.reader.Reader`) that reserves slots for the reads of token passes."""

    def reserve(self, slot: int) -> None: ...

    def need_below(self, least_slots: int) -> None: ...

    def reclaim(self) -> Sequence[int]: ...


def reserved_slots_for(num_slots: int) -> int:
    """Slots of a pool that are reserved at a time."""
    return max(1, min(MOST_RESERVED, num_slots // SLOTS_PER_RESERVATION))


class ReservedSlots:
    """Reserved slots of one tier, out of which the CPU computes."""

    def __init__(self, tier: Tier, reads: SpareSlots) -> None:
        self._tier = tier
        self._reads = reads

    def reserve(self, *, may_evict: bool) -> None:
        """Reserve slots up to the usual number. may_evict: the least valuable experts may be evicted for them."""
        tier = self._tier
        with tier.changed:
            tier.drain_completions()
            residency = tier.residency
            num_usual = reserved_slots_for(residency.num_slots)
            while residency.num_reserved < num_usual and (slot := residency.reserve(may_evict=may_evict)) is not None:
                self._reads.reserve(slot)
            has_all = residency.num_reserved == num_usual  # else no more are available, and a need could not be served
            self._reads.need_below(num_usual // 2 if has_all else 0)
            tier.counters.num_evictions = residency.num_evictions

    def reclaim(self) -> None:
        """Free reserved slots that are not in use; slots that are being filled follow when their reads have ended."""
        tier = self._tier
        with tier.changed:
            slots = self._reads.reclaim()
            tier.drain_completions()  # of their last reads
            for slot in slots:
                tier.residency.reclaim(slot)
            tier.changed.notify_all()


class PassAccounts:
    """Enters what token passes read into reserved slots (lock held). Does not keep the tier alive."""

    def __init__(self, tier: Tier) -> None:
        self._tier = weakref.ref(tier)
        self._arrived = tier.arrived

    def began(self, key: int, slot: int, was_prefetch: bool) -> Arrived:
        """See `memory.transfers.PassReads`."""
        tier = self._tier()
        if tier is not None:
            tier.residency.num_reserved -= 1
            if was_prefetch:
                tier.unproven.add(key)
                tier.counters.num_prefetches += 1
                if tier.observer is not None:
                    tier.observer.prefetched(tier.keys.layer_expert(key)[0], 1)
        return self._arrived

    def dropped(self, key: int, slot: int, was_prefetch: bool) -> None:
        """See `memory.transfers.PassReads`."""
        tier = self._tier()
        if tier is not None:
            tier.residency.num_reserved += 1
            if was_prefetch:
                tier.unproven.discard(key)
                tier.counters.num_cancelled_prefetches += 1
            tier.changed.notify_all()
