"""Slots of a tier that native token passes fill: reserved in advance, and accounted for when Python drains completions.

A pass decides only what it fetches. Evictions happen when a slot is reserved.
"""

from offload_moe.native.kernels import DONE, FAILED, READING, Reads
from offload_moe.residency.tier import Tier

SLOTS_PER_CHOICE = 2  # that a pass needs: for a layer's experts, beside those of a layer that another thread computes
SLOTS_PER_RESERVATION = 24  # one slot of so many is reserved, and empty until a pass needs it
MOST_RESERVED = 12
DRAIN_INTERVAL_S = 0.002  # between two looks at the completions, while a read of a pass is waited for


def reserved_slots_for(num_slots: int) -> int:
    """How many slots of a pool are reserved at a time."""
    return max(1, min(MOST_RESERVED, num_slots // SLOTS_PER_RESERVATION))


class ReservedSlots:
    """Of one tier, which computes where it lies."""

    def __init__(self, tier: Tier, reads: Reads) -> None:
        self.reads = reads
        self._tier = tier
        self._num_reading = 0

    @property
    def drain_interval_s(self) -> float | None:
        """How long to wait before the next drain; None: nothing is on its way."""
        return DRAIN_INTERVAL_S if self._num_reading else None

    def reserve(self, *, may_evict: bool) -> None:
        """Reserve slots up to the usual number. may_evict: the least valuable experts may be evicted for them."""
        tier = self._tier
        with tier.changed:
            self.drain_completions()
            residency = tier.residency
            num_wanted = reserved_slots_for(residency.num_slots)
            while residency.num_reserved < num_wanted and (slot := residency.reserve(may_evict=may_evict)) is not None:
                self.reads.reserve(slot)
            self.reads.ask_below(num_wanted // 2 if residency.num_reserved == num_wanted else 0)  # as there are no more
            tier.counters.num_evictions = residency.num_evictions

    def reclaim(self) -> None:
        """Take back reserved slots that are not in use; slots that are being filled follow later."""
        tier = self._tier
        with tier.changed:
            for slot in self.reads.reclaim():
                self.drain_completions()
                tier.residency.reclaim(slot)
            self.drain_completions()
            tier.changed.notify_all()

    def drain_completions(self) -> None:
        """Account for what has been fetched (lock held)."""
        tier, has_changed = self._tier, False
        residency, counters = tier.residency, tier.counters
        for completion in self.reads.completions():
            key, slot, was_prefetch = completion.key, completion.slot, bool(completion.was_prefetch)
            if completion.state == READING:
                residency.admit_reserved(key, slot)
                self._num_reading += 1
                if was_prefetch:
                    tier.unproven.add(key)
                    counters.num_prefetches += 1
                    if tier.observer is not None:
                        tier.observer.prefetched(tier.keys.layer_expert(key)[0], 1)
                continue
            self._num_reading -= 1
            has_changed = True
            if completion.state == DONE:
                residency.loaded(slot)
                counters.disk_bytes += self.reads.num_bytes(key)
            elif completion.state == FAILED:
                tier.read_again(key, slot)
            else:
                residency.reserve_again(slot)
                if was_prefetch:
                    tier.unproven.discard(key)
                    counters.num_cancelled_prefetches += 1
        if has_changed:
            tier.changed.notify_all()

    def demand(self, key: int) -> None:
        """Mark this expert as demanded (lock held): from now on a read of it is not dropped."""
        self.reads.demand(key)
        self.drain_completions()

    def close(self) -> None:
        """Close the reads; what is in flight ends first."""
        self.reads.close()
