"""The scheduler of a tier: `acquire`, the one verb between arithmetic and bytes.

    with scheduler.acquire(layer, experts) as lease:
        for wave in lease:                      # resident experts first, then the others as they arrive
            for expert, slot in wave: ...

Leases are in `lease.py`.
"""

from collections.abc import Collection, Sequence

from offload_moe.residency.accounts import Found, note_layer
from offload_moe.residency.lease import Lease
from offload_moe.residency.tier import Tier

MAX_PREFETCHES = 64  # on their way at once; each occupies a slot


class Scheduler(Tier):
    """A tier that layers acquire experts from. Safe to use from several threads."""

    def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        weights: Sequence[float] | None = None,
        num_tokens: int = 1,
        *,
        on_cpu: Sequence[int] = (),
        found: Found | None = None,
    ) -> Lease:
        """Lease experts that are resident, start loading the others. Does not wait.

        experts: distinct ids. weights, num_tokens: as `Policy.access` takes them. on_cpu: other experts of the layer,
        computed from the tier below: they count as routed and missed, but are not loaded. found: how a token pass
        found the experts, some of which it has fetched since.
        """
        keys = self.keys.keys(layer, experts)
        with self.changed:
            self.lifecycle.check_waiting()
            self.end_loan()
            self.drain_completions()
            seen = keys
            if on_cpu:
                self._note_on_cpu(layer, on_cpu)
                seen = sorted([*keys, *self.keys.keys(layer, on_cpu)])
            self.drop_wrong_guesses(layer, seen)
            self.residency.policy.access(layer, seen, None if on_cpu else weights, num_tokens)
            self.uses.note(seen)
            return Lease(self, layer, keys, found)

    def hold(self, layer: int, experts: Sequence[int]) -> list[int] | None:
        """The slots of these experts, leased until `release_held`, where all are resident; else None and no change.

        `acquire` and one wave in one, with the lock taken once: the usual decode step of a model that fits.
        """
        keys = self.keys.keys(layer, experts)
        with self.changed:
            self.lifecycle.check_waiting()
            self.end_loan()
            self.drain_completions()
            slots = self.residency.lease_all(keys)
            if slots is not None:
                note_layer(self, layer, keys)
        return slots

    def release_held(self, slots: Sequence[int]) -> None:
        """End the leases of `hold`; compute that reads the slots has been issued."""
        with self.changed:
            self.mover.used(slots)
            self.residency.release_all(slots)
            self.changed.notify_all()

    def settle(self) -> None:
        """Wait for the copies that were demanded. Costs nothing if the compute that follows them is waited for next.

        Raises: TransferError when they do not land in time.
        """
        if self.flights is not None:
            try:
                self.counters.stall_s += self.flights.settle(self.stall_limit_s)
            except TimeoutError:
                raise self.late("Copies of experts to the device") from None

    def prefetch(self, layer: int, experts: Sequence[int], keep: Collection[int] = ()) -> int:
        """Start loading experts that are not demanded yet, as far as slots are available. Returns the number started.

        Evicts no leased expert for them, none of them, and none of the keys in `keep`.
        """
        keys = self.keys.keys(layer, experts)
        num_started = 0
        with self.changed:
            self.drain_completions()
            spared = {*keep, *keys}
            for key in keys:
                if self.residency.find(key) is None:
                    if len(self.flying) >= MAX_PREFETCHES or self.start(key, spared, is_prefetch=True) is None:
                        break
                    num_started += 1
                    self.unproven.add(key)
            self.counters.num_prefetches += num_started
            if self.observer is not None:
                self.observer.prefetched(layer, num_started)
        return num_started

    def resident(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of the experts that are resident."""
        first = self.keys.first(layer)
        with self.changed:
            found = [(expert, self.residency.find(first + expert)) for expert in experts]
            return [expert for expert, slot in found if slot is not None and self.residency.is_resident(slot)]

    def _note_on_cpu(self, layer: int, experts: Sequence[int]) -> None:
        self.counters.num_misses += len(experts)
        self.counters.num_computed_on_cpu += len(experts)
        if self.observer is not None:
            self.observer.computed_on_cpu(layer, experts)
