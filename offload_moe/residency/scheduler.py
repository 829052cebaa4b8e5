"""Acquire, wait, release: the one verb that crosses the border between arithmetic and bytes.

    with scheduler.acquire(layer, experts) as lease:
        for wave in lease:                      # resident experts first, then the others as they arrive
            for expert, slot in wave: ...

What a lease is and does is in `lease.py`.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from offload_moe.errors import TransferError
from offload_moe.memory.flights import Flights
from offload_moe.memory.mover import Arrived, Mover
from offload_moe.memory.waiting import wait_step
from offload_moe.residency.accounts import note_layer
from offload_moe.residency.counters import Counters
from offload_moe.residency.lease import Found, Lease
from offload_moe.residency.observer import Observer
from offload_moe.residency.policy.protocol import Policy
from offload_moe.residency.reserved import ReservedSlots
from offload_moe.residency.residency import Residency
from offload_moe.residency.uses import Uses
from offload_moe.system.lifecycle import Lifecycle

STALL_LIMIT_S = 120.0  # a transfer that takes longer than this is reported instead of waited for
MAX_PREFETCHES = 64  # on their way at once; each holds a slot that nothing else can use
FILL_DEPTH = 4  # reads of a warm start in flight: all that is not in flight can still be overtaken


class Scheduler:
    """One tier: its slots, the mover that fills them, and who waits for what. Safe to use from several threads."""

    def __init__(
        self,
        residency: Residency,
        mover: Mover,
        *,
        num_experts: int,
        bytes_counter: str = "disk_bytes",
        stall_limit_s: float = STALL_LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
        changed: threading.Condition | None = None,
        flights: Flights | None = None,
        lifecycle: Lifecycle | None = None,
    ) -> None:
        """bytes_counter: the field of `Counters` that this tier's transfers add to. clock, changed: how to wait.

        flights: the mover's, where compute can follow copies that are still on their way. lifecycle: of the model.
        """
        self.lifecycle = lifecycle or Lifecycle()
        self.residency = residency
        self.mover = mover
        self.counters = Counters()
        self.num_experts = num_experts
        self.stall_limit_s = stall_limit_s
        self.clock = clock
        self.flights = flights
        self.changed = changed or (flights.changed if flights is not None else threading.Condition())
        self.failed: dict[int, BaseException] = {}
        self.unproven: set[int] = set()  # prefetched and not asked for since
        self.uses = Uses()
        self.is_asked_by_layer = (
            True  # an acquire names all that a layer wants: what it does not name was guessed wrong
        )
        self._flying: dict[int, int] = {}  # slot -> key of a prefetch on its way
        self._wanted: deque[int] = deque()  # what a warm start still has to bring
        self.observer: Observer | None = None
        self.reserved: ReservedSlots | None = None
        self._bytes_counter = bytes_counter
        self._bytes_counters = self.counters
        self._on_arrival = _on_arrival(weakref.ref(self))

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
        """Lease what is resident, start loading what is not. Does not wait.

        experts: distinct ids. weights, num_tokens: as `Policy.access` takes them. on_cpu: other experts of the layer,
        computed from the tier below: they are routed to and missed here, but not loaded. found: how a run found them,
        which has fetched some of them since.
        """
        first = layer * self.num_experts
        keys = [first + expert for expert in experts]
        with self.changed:
            self.lifecycle.check_waiting()
            self.drain_completions()
            seen = keys
            if on_cpu:
                self._note_on_cpu(layer, on_cpu)
                seen = sorted([*keys, *(first + expert for expert in on_cpu)])
            self.drop_wrong_guesses(layer, seen)
            self.residency.policy.access(layer, seen, None if on_cpu else weights, num_tokens)
            self.uses.note(seen)
            return Lease(self, first, keys, found)

    def hold(self, layer: int, experts: Sequence[int]) -> list[int] | None:
        """The slots of these experts, leased until `release_held`, where all are resident; else None and no change.

        What `acquire` and one wave do, with the lock taken once: the usual decode step of a model that fits.
        """
        first = layer * self.num_experts
        keys = [first + expert for expert in experts]
        with self.changed:
            self.lifecycle.check_waiting()
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
        """Wait for the copies that were demanded. Where the compute that follows them is waited for next, this is free.

        Raises: TransferError when they do not land in time.
        """
        if self.flights is not None:
            try:
                self.counters.stall_s += self.flights.settle(self.stall_limit_s)
            except TimeoutError:
                raise self.late("Copies of experts to the device") from None

    def late(self, what: str) -> TransferError:
        """What is said of transfers that are not waited for any longer."""
        return TransferError(
            f"{what} did not arrive within {self.stall_limit_s:.0f} s. "
            "Check the disk that holds the store, then ask again."
        )

    def is_resident(self, layer: int, expert: int) -> bool:
        """Whether the expert is in a slot and complete (lock held by whoever relies on it)."""
        slot = self.residency.find(layer * self.num_experts + expert)
        return slot is not None and self.residency.is_resident(slot)

    def is_known(self, layer: int, expert: int) -> bool:
        """Whether the expert is in a slot or on its way to one (lock held by whoever relies on it)."""
        return self.residency.find(layer * self.num_experts + expert) is not None

    def prefetch(self, layer: int, experts: Sequence[int], keep: Collection[int] = ()) -> int:
        """Start loading experts nobody asked for yet, as far as slots can be had. Returns how many were started.

        Neither a leased expert is evicted for them, nor one of them, nor one of the keys in `keep`.
        """
        first = layer * self.num_experts
        keys = [first + expert for expert in experts]
        num_started = 0
        with self.changed:
            self.drain_completions()
            spared = {*keep, *keys}
            for key in keys:
                if self.residency.find(key) is None:
                    if len(self._flying) >= MAX_PREFETCHES or self.start(key, spared, is_prefetch=True) is None:
                        break
                    num_started += 1
                    self.unproven.add(key)
            self.counters.num_prefetches += num_started
            if self.observer is not None:
                self.observer.prefetched(layer, num_started)
        return num_started

    def resident(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of the experts whose bytes are here."""
        first = layer * self.num_experts
        with self.changed:
            found = [(expert, self.residency.find(first + expert)) for expert in experts]
            return [expert for expert, slot in found if slot is not None and self.residency.is_resident(slot)]

    def drain_completions(self) -> None:
        """Learn what native runs have fetched by themselves (lock held)."""
        if self.reserved is not None:
            self.reserved.drain_completions()

    def wait(self, limit_s: float) -> float:
        """Until something may have changed (lock held). Returns the seconds that count against a limit.

        Raises: ModelClosed.
        """
        self.lifecycle.check_waiting()
        drain_interval_s = self.reserved.drain_interval_s if self.reserved is not None else None
        waited_s = wait_step(
            self.changed, limit_s if drain_interval_s is None else min(limit_s, drain_interval_s), self.clock
        )
        self.drain_completions()
        return waited_s

    def promote(self, key: int, slot: int) -> None:
        """The expert on its way is demanded (lock held). It may turn out to have been dropped just before."""
        self.mover.promote(slot)
        if self.reserved is not None:
            self.reserved.demand(key)

    def read_again(self, key: int, slot: int) -> None:
        """A run's read of it has failed (lock held): the mover has more patience, and words for what is wrong."""
        self.mover.start(key, slot, self._on_arrival)

    def fill(self, keys: Iterable[int]) -> None:
        """Bring experts into slots that are free, the most valuable first, while nothing is demanded."""
        with self.changed:
            self._wanted = deque(keys)
            for _ in range(FILL_DEPTH):
                self._fill_one()

    def _fill_one(self) -> None:
        """Begin one transfer of a warm start (lock held); nothing is evicted for it."""
        while self._wanted and self.residency.num_free:
            key = self._wanted.popleft()
            if self.residency.find(key) is None:
                self.start(key, is_prefetch=True)
                return
        self._wanted.clear()

    def drop_wrong_guesses(self, layer: int, keys: Sequence[int]) -> None:
        """Forget what was guessed up to this layer, is still waiting to be read and is not asked for (lock held)."""
        if not self._flying or not self.is_asked_by_layer:
            return
        end = (layer + 1) * self.num_experts
        num_before = len(self._flying)
        for slot, key in list(self._flying.items()):
            is_wrong = key < end and key in self.unproven and key not in keys
            if is_wrong and not self.residency.num_leases(slot) and self.mover.cancel(slot):
                self.unproven.discard(key)
                self._flying.pop(slot)
                self.residency.abandon(slot)
                self.counters.num_cancelled_prefetches += 1
        if len(self._flying) < num_before:
            self.changed.notify_all()  # slots have become free

    def start(self, key: int, keep: Collection[int] = (), *, is_prefetch: bool = False) -> int | None:
        """Take a slot and begin the transfer (lock held). None when no slot can be had now."""
        slot = self.residency.admit(key, keep)
        if slot is not None:
            self.counters.num_evictions = self.residency.num_evictions
            if is_prefetch:
                self._flying[slot] = key
            self.mover.start(key, slot, self._on_arrival, is_prefetch=is_prefetch)
        return slot

    def demanded(self, key: int, *, is_here: bool) -> None:
        """Count a prefetch that was worth it (lock held): its expert is asked for while it is here or on its way."""
        if key in self.unproven:
            self.unproven.discard(key)
            self.counters.num_useful_prefetches += is_here

    def release(self, slots: Sequence[int]) -> None:
        """End one lease on each slot (lock held); a slot whose transfer failed is freed by its last lessee."""
        for slot in slots:
            self.residency.release(slot)
            if slot in self.failed and not self.residency.num_leases(slot):
                del self.failed[slot]
                self.residency.abandon(slot)
        if slots:
            self.changed.notify_all()

    def shrink(self, num_slots: int) -> None:
        """Empty the slots from `num_slots` on and give them up: what is leased is waited for, what arrives too.

        Raises: TransferError when they are not free in time; nothing has changed then.
        """
        with self.changed:
            self.residency.close_slots(num_slots)
            left_s = self.stall_limit_s
            while not (is_empty := self._empty_closed_slots()) and left_s > 0:
                left_s -= self.wait(left_s)
            self.counters.num_evictions = self.residency.num_evictions
            if not is_empty:
                self.residency.open_slots()
                self.changed.notify_all()
                raise TransferError(
                    f"A pool cannot shrink to {num_slots} slots: some of the others are still leased or loading after "
                    f"{self.stall_limit_s:.0f} s. Resize between answers, not while a layer is being computed."
                )
            self.residency.cut()

    def _empty_closed_slots(self) -> bool:
        """Whether all of them are free (lock held); a wrong guess, dropped after its run, leaves its slot lent."""
        if self.reserved is not None:
            self.reserved.reclaim()
        return self.residency.empty_closed_slots()

    def grow(self, num_slots: int) -> None:
        """Use slots up to `num_slots`, which the mover can fill already."""
        with self.changed:
            self.residency.grow(num_slots)
            self.changed.notify_all()

    def use_policy(self, policy: Policy) -> None:
        """Let another policy decide from now on."""
        with self.changed:
            self.residency.use_policy(policy)

    def _note_on_cpu(self, layer: int, experts: Sequence[int]) -> None:
        self.counters.num_misses += len(experts)
        self.counters.num_computed_on_cpu += len(experts)
        if self.observer is not None:
            self.observer.computed_on_cpu(layer, experts)

    def count_bytes_in(self, counters: Counters) -> None:
        """Add moved bytes to another tier's counters from now on."""
        self._bytes_counters = counters

    def close(self) -> None:
        if self.reserved is not None:
            self.reserved.reads.close()
        self.mover.close()

    def _arrived(self, slot: int, num_bytes: int, error: BaseException | None) -> None:
        with self.changed:
            was_prefetch = self._flying.pop(slot, None) is not None
            if error is None:
                self.residency.loaded(slot)
                moved = getattr(self._bytes_counters, self._bytes_counter)
                setattr(self._bytes_counters, self._bytes_counter, moved + num_bytes)
            elif self.residency.num_leases(slot):
                self.failed[slot] = error
            else:
                self.residency.abandon(slot)
            if was_prefetch and self._wanted and error is None:
                self._fill_one()
            self.changed.notify_all()


def _on_arrival(reference: "weakref.ref[Scheduler]") -> Arrived:
    """What a transfer calls at its end, and does not keep the scheduler alive with meanwhile."""

    def arrived(slot: int, num_bytes: int, error: BaseException | None) -> None:
        scheduler = reference()
        if scheduler is not None:
            scheduler._arrived(slot, num_bytes, error)

    return arrived
