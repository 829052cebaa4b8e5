"""One tier: its slots, the mover that fills them, and its counters. How layers acquire from it is in `scheduler.py`."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from offload_moe.errors import TransferError
from offload_moe.memory.flights import Flights
from offload_moe.memory.mover import Arrived, Mover
from offload_moe.memory.waiting import wait_step
from offload_moe.residency.counters import Counters
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.observer import Observer
from offload_moe.residency.policy.protocol import Policy
from offload_moe.residency.residency import Residency
from offload_moe.residency.uses import Uses
from offload_moe.system.lifecycle import Lifecycle

STALL_LIMIT_S = 120.0  # a transfer that takes longer is an error
FILL_DEPTH = 4  # reads of a warm start in flight; a demand overtakes all others


class Reservations(Protocol):
    """Slots that are reserved for token passes."""

    def reclaim(self) -> None:
        """Free the slots that are not in use."""


class Tier:
    """The state of one tier and its changes. Safe to use from several threads."""

    def __init__(
        self,
        residency: Residency,
        mover: Mover,
        *,
        keys: ExpertKeys,
        bytes_counter: str = "disk_bytes",
        stall_limit_s: float = STALL_LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
        changed: threading.Condition | None = None,
        flights: Flights | None = None,
        lifecycle: Lifecycle | None = None,
    ) -> None:
        """bytes_counter: the field of `Counters` that this tier's transfers add to. clock, changed: for waits.

        flights: the mover's, if compute can follow copies that are still on their way. lifecycle: of the model.
        """
        self.lifecycle = lifecycle or Lifecycle()
        self.residency = residency
        self.mover = mover
        self.counters = Counters()
        self.keys = keys
        self.stall_limit_s = stall_limit_s
        self.clock = clock
        self.flights = flights
        self.changed = changed or (flights.changed if flights is not None else threading.Condition())
        self.failed: dict[int, BaseException] = {}
        self.unproven: set[int] = set()  # prefetched and not demanded since
        self.uses = Uses()
        # Whether an acquire names all experts that a layer uses: then a guess that it does not name was wrong.
        self.acquires_name_layers = True
        self.flying: dict[int, int] = {}  # slot -> key of a prefetch on its way
        self._to_fill: deque[int] = deque()  # what a warm start still has to load
        self.observer: Observer | None = None
        self.reserved: Reservations | None = None
        self.lender: Callable[[], None] | None = None  # ends what `Residency.lend` has begun, and all other loans
        self._bytes_counter = bytes_counter
        self._bytes_counters = self.counters
        self.arrived = _on_arrival(weakref.ref(self))  # what transfers call at their end

    def is_resident(self, layer: int, expert: int) -> bool:
        """Whether the expert is in a slot and complete (the lock is held by a caller that relies on it)."""
        slot = self.residency.find(self.keys.key(layer, expert))
        return slot is not None and self.residency.is_resident(slot)

    def is_known(self, layer: int, expert: int) -> bool:
        """Whether the expert is in a slot or on its way to one (the lock is held by a caller that relies on it)."""
        return self.residency.find(self.keys.key(layer, expert)) is not None

    def late(self, what: str) -> TransferError:
        """The error for transfers that are not waited for any longer."""
        return TransferError(
            f"{what} did not arrive within {self.stall_limit_s:.0f} s. "
            "Check the disk that holds the store, then try again."
        )

    def drain_completions(self) -> None:
        """Enter the transfers that have ended (lock held)."""
        self.mover.drain()

    def wait(self, limit_s: float) -> float:
        """Wait until something may have changed (lock held). Returns the seconds that count against a limit.

        Raises: ModelClosed.
        """
        self.lifecycle.check_waiting()
        waited_s = wait_step(self.changed, limit_s, self.clock)
        self.drain_completions()
        return waited_s

    def end_loan(self) -> None:
        """Have the slots back that a device decides about (lock held, by this call alone)."""
        while self.residency.is_lent and self.lender is not None:
            self.changed.release()  # a pass that is under way needs it to end
            try:
                self.lender()
            finally:
                self.changed.acquire()

    def promote(self, slot: int) -> None:
        """Treat the transfer into the slot as a demand (lock held). Its read may have been dropped just before."""
        self.drain_completions()  # which may include its beginning
        self.mover.promote(slot)
        self.drain_completions()

    def fill(self, keys: Iterable[int]) -> None:
        """Load experts into free slots, the most valuable first, behind all demands."""
        with self.changed:
            self._to_fill = deque(keys)
            for _ in range(FILL_DEPTH):
                self._fill_one()

    def _fill_one(self) -> None:
        """Begin one transfer of a warm start (lock held); nothing is evicted for it."""
        while self._to_fill and self.residency.num_free:
            key = self._to_fill.popleft()
            if self.residency.find(key) is None:
                self.start(key, is_prefetch=True)
                return
        self._to_fill.clear()

    def drop_wrong_guesses(self, layer: int, keys: Sequence[int]) -> None:
        """Cancel guesses up to this layer that are not being read yet and not among `keys` (lock held)."""
        if not self.flying or not self.acquires_name_layers:
            return
        end = self.keys.end(layer)
        num_before = len(self.flying)
        for slot, key in list(self.flying.items()):
            is_wrong = key < end and key in self.unproven and key not in keys
            if is_wrong and not self.residency.num_leases(slot) and self.mover.cancel(slot):
                self.unproven.discard(key)
                self.flying.pop(slot)
                self.residency.abandon(slot)
                self.counters.num_cancelled_prefetches += 1
        if len(self.flying) < num_before:
            self.changed.notify_all()  # slots have become free

    def start(self, key: int, keep: Collection[int] = (), *, is_prefetch: bool = False) -> int | None:
        """Take a slot and begin the transfer (lock held). None when no slot is available now."""
        slot = self.residency.admit(key, keep)
        if slot is not None:
            self.counters.num_evictions = self.residency.num_evictions
            if is_prefetch:
                self.flying[slot] = key
            self.mover.start(key, slot, self.arrived, is_prefetch=is_prefetch)
        return slot

    def demanded(self, key: int, *, is_here: bool) -> None:
        """Count a prefetch that was useful (lock held): its expert is demanded while it is resident or on its way."""
        if key in self.unproven:
            self.unproven.discard(key)
            self.counters.num_useful_prefetches += is_here

    def release(self, slots: Sequence[int]) -> None:
        """End one lease on each slot (lock held); the last release of a slot whose transfer has failed frees it."""
        for slot in slots:
            self.residency.release(slot)
            if slot in self.failed and not self.residency.num_leases(slot):
                del self.failed[slot]
                self.residency.abandon(slot)
        if slots:
            self.changed.notify_all()

    def shrink(self, num_slots: int) -> None:
        """Empty the slots from `num_slots` on and give them up; waits for their leases and transfers.

        Raises: TransferError when they are not free in time; nothing has changed then.
        """
        if self.lender is not None:
            self.lender()
        with self.changed:
            self.end_loan()
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
                    f"{self.stall_limit_s:.0f} s. Resize between answers, not while a layer is computed."
                )
            self.residency.cut()

    def _empty_closed_slots(self) -> bool:
        """Empty them and return whether all are FREE (lock held). A guess that is dropped leaves its slot reserved."""
        if self.reserved is not None:
            self.reserved.reclaim()
        return self.residency.empty_closed_slots()

    def grow(self, num_slots: int) -> None:
        """Use slots up to `num_slots`, which the mover must be able to fill."""
        with self.changed:
            self.end_loan()
            self.residency.grow(num_slots)
            self.changed.notify_all()

    def use_policy(self, policy: Policy) -> None:
        """Replace the policy."""
        with self.changed:
            self.residency.use_policy(policy)

    def count_bytes_in(self, counters: Counters) -> None:
        """Add moved bytes to another tier's counters from now on."""
        self._bytes_counters = counters

    def close(self) -> None:
        """Close the mover."""
        self.mover.close()

    def _arrived(self, slot: int, num_bytes: int, error: BaseException | None) -> None:
        with self.changed:
            was_prefetch = self.flying.pop(slot, None) is not None
            if error is None:
                self.residency.loaded(slot)
                moved = getattr(self._bytes_counters, self._bytes_counter)
                setattr(self._bytes_counters, self._bytes_counter, moved + num_bytes)
            elif self.residency.num_leases(slot):
                self.failed[slot] = error
            else:
                self.residency.abandon(slot)
            if was_prefetch and self._to_fill and error is None:
                self._fill_one()
            self.changed.notify_all()


def _on_arrival(reference: "weakref.ref[Tier]") -> Arrived:
    """The function that a transfer calls at its end, which does not keep the tier alive."""

    def arrived(slot: int, num_bytes: int, error: BaseException | None) -> None:
        tier = reference()
        if tier is not None:
            tier._arrived(slot, num_bytes, error)

    return arrived
