"""The routed experts of one layer while it is computed: those that are ready, on their way, or waiting for a slot.

A wave's slots are leased until the lease ends, or, while other experts of the layer still need slots, until the next
wave. When a layer routes to more experts than there are slots, the lease takes more waves; down to one slot it never
deadlocks, because a lease never waits for a slot while it holds one.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from offload_moe.errors import TransferError
from offload_moe.residency.accounts import Found, count_found
from offload_moe.residency.tier import Tier
from offload_moe.system.stopping import leave_if_stopped

Wave = list[tuple[int, int]]


class Lease:
    """The routed experts of one layer for one forward. Iterate it once; leaving the context releases what is held."""

    def __init__(self, tier: Tier, layer: int, keys: Sequence[int], found: Found | None = None) -> None:
        """found: how a token pass found the layer's experts before this lease; None: as they are now."""
        self._tier = tier
        self._layer = layer
        self._first_key = tier.keys.first(layer)
        self._ready: Wave = []
        self._loading: Wave = []
        self._held: Wave = []
        self._absent = [key for key in keys if not self._join(key)]
        arriving, missing = found or (
            [expert for expert, _ in self._loading],
            [key - self._first_key for key in self._absent],
        )
        count_found(tier, layer, len(keys), arriving, missing)
        self._admit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release all slots."""
        with self._tier.changed:
            self._release_held()
            self._tier.release([slot for wave in (self._ready, self._loading) for _, slot in wave])
            self._ready, self._loading, self._absent = [], [], []

    def __iter__(self) -> Iterator[Wave]:
        """Waves of ``(expert, slot)``; each wave holds every expert that is ready by then.

        Raises:
            TransferError: an expert of this lease could not be loaded, or not in time.
            StoppedInForward: the forward of this thread is to end.
        """
        while self._ready or self._loading or self._absent:
            leave_if_stopped()
            yield self._next_wave()

    def poll(self) -> Wave:
        """The next wave if any expert is ready, else an empty one. Does not wait."""
        return self._next_wave(may_wait=False)

    def have_come(self) -> bool:
        """Whether all experts are resident by now; they stay leased, as after `bring`. Does not wait."""
        with self._tier.changed:
            self._admit()
            self._collect()
            return not self._loading and not self._absent

    def bring(self) -> None:
        """Wait until all experts are resident, and keep them leased: for compute that finds them in the slot table.

        The pool must have slots for all at once. Raises: TransferError, as iterating does.
        """
        tier = self._tier
        with tier.changed:
            self._collect()
            if self._loading or self._absent:
                self._wait(for_all=True)
            tier.counters.num_waves += 1

    def _next_wave(self, *, may_wait: bool = True) -> Wave:
        tier = self._tier
        while True:
            with tier.changed:
                if self._absent:
                    self._release_held()
                    self._admit()
                self._collect()
                if may_wait and not self._ready and (self._loading or self._absent):
                    tier.counters.stall_s += self._wait()
                followed = self._first_flying() if may_wait and not self._ready else None
                if followed is None:
                    return self._take_ready()
            if self._follow(followed):
                with tier.changed:
                    self._loading.remove(followed)
                    self._ready.append(followed)
                    self._collect()
                    return self._take_ready()

    def _take_ready(self) -> Wave:
        """Hold the experts that are ready from now on (lock held)."""
        wave, self._ready = self._next_half() if self._absent and not self._loading else (self._ready, [])
        self._held += wave
        self._tier.counters.num_waves += bool(wave)
        return wave

    def _first_flying(self) -> tuple[int, int] | None:
        """The entry of this lease whose copy was issued first (lock held): compute can follow it."""
        flights = self._tier.flights
        if flights is None or not self._loading:
            return None
        slot = flights.first([slot for _, slot in self._loading])
        return next((entry for entry in self._loading if entry[1] == slot), None)

    def _follow(self, entry: tuple[int, int]) -> bool:
        """Order compute that is issued from now on after the entry's copy. No lock is held: the host may wait."""
        tier = self._tier
        assert tier.flights is not None
        began = tier.clock()
        try:
            return tier.flights.follow(entry[1], tier.stall_limit_s)
        except TimeoutError:
            raise self._late(1) from None
        finally:
            tier.counters.stall_s += tier.clock() - began

    def _next_half(self) -> tuple[Wave, Wave]:
        """Split a wave that occupies all slots: half is computed while the other half's successors are loaded."""
        middle = (len(self._ready) + 1) // 2
        return self._ready[:middle], self._ready[middle:]

    def _wait(self, *, for_all: bool = False) -> float:
        """Wait until an expert is resident or flying, or until all are resident (lock held). Returns the seconds."""
        tier = self._tier
        began, left_s = tier.clock(), tier.stall_limit_s
        while self._loading or self._absent if for_all else not self._ready and self._first_flying() is None:
            if left_s <= 0:
                raise self._late(len(self._loading) + len(self._absent))
            left_s -= tier.wait(left_s)
            self._admit()
            self._collect()
        return tier.clock() - began

    def _late(self, num_missing: int) -> TransferError:
        return self._tier.late(f"{num_missing} experts of layer {self._layer}")

    def _admit(self) -> None:
        """Find or start experts that are still absent, while slots are available (lock held)."""
        while self._absent:
            key = self._absent[0]
            if not self._join(key):
                slot = self._tier.start(key)
                if slot is None:
                    return
                self._tier.residency.lease(slot)
                self._loading.append((key - self._first_key, slot))
            self._absent.pop(0)

    def _join(self, key: int) -> bool:
        """Lease the slot that holds or is loading `key`, if there is one (lock held)."""
        residency = self._tier.residency
        slot = residency.find(key)
        if slot is not None and not residency.is_resident(slot):
            self._tier.promote(slot)
            slot = residency.find(key)
        if self._tier.unproven:
            self._tier.demanded(key, is_here=slot is not None)
        if slot is None:
            return False
        residency.lease(slot)
        if residency.is_resident(slot):
            self._ready.append((key - self._first_key, slot))
        else:
            self._loading.append((key - self._first_key, slot))
        return True

    def _collect(self) -> None:
        """Move experts that have arrived from loading to ready; raise the error of one that has failed (lock held)."""
        tier = self._tier
        for _, slot in self._loading:
            if error := tier.failed.get(slot):
                raise error
        arrived = [entry for entry in self._loading if tier.residency.is_resident(entry[1])]
        if arrived:
            self._ready += arrived
            self._loading = [entry for entry in self._loading if entry not in arrived]

    def _release_held(self) -> None:
        """Release the last wave, as compute that reads its slots has been issued (lock held)."""
        if self._held:
            slots = [slot for _, slot in self._held]
            self._tier.mover.used(slots)
            self._held = []
            self._tier.release(slots)
