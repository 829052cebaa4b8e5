"""Copies that were issued to the link and have not landed.

Compute does not wait for a landing, it follows a copy: on a device the host continues at once, and the compute that it
issues begins when the copy is done. One thread notices landings, and then the slot is resident for all threads.
"""

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice, takewhile

from offload_moe.memory.copier import Copier, Marker
from offload_moe.memory.pace import LinkPace
from offload_moe.memory.waiting import wait_step
from offload_moe.memory.workers import CLOSE_LIMIT_S
from offload_moe.system.lifecycle import finalize

MOST_TOGETHER = 4  # landings that are noticed at once; a slot whose copy has landed unnoticed cannot be used again


@dataclass(slots=True, eq=False)
class Flight:
    """A copy on its way.

    land: called once, with the error or None, from the thread that notices landings. marker: None if not issued.
    began: seconds, from `LinkPace.begin`.
    """

    slot: int
    land: Callable[[BaseException | None], None]
    marker: Marker | None = None
    began: float = 0.0
    error: BaseException | None = None
    is_prefetch: bool = False


class Flights:
    """Copies in the order in which they were issued. Safe to use from several threads."""

    def __init__(self, copier: Copier, pace: LinkPace, issue_more: Callable[[], None]) -> None:
        """issue_more: called by the thread that notices landings, after these and `request_issue`; no lock is held."""
        self._copier = copier
        self._pace = pace
        self._issue_more = issue_more
        self._is_issue_requested = False
        self._is_watching = False  # the thread waits for a landing, and does nothing else before
        self._flying: OrderedDict[int, Flight] = OrderedDict()  # by slot
        self._awaited: set[Flight] = set()  # demanded, or followed by compute, and not landed
        self._followed_at: float | None = None  # when compute followed the first of them
        self._landed_at = 0.0
        self._is_closed = threading.Event()
        lock = threading.RLock()  # shared with the scheduler: a thread that is woken in an acquire runs after it
        self.changed, self._has_work = threading.Condition(lock), threading.Condition(lock)
        shared = (weakref.ref(self), self._has_work, self._is_closed)
        thread = threading.Thread(target=_notice_landings, args=shared, name="expert-landings", daemon=True)
        thread.start()
        self._close = finalize(self, _close, self._has_work, self._is_closed, thread)  # as with `TransferWorkers`

    def __len__(self) -> int:
        return len(self._flying)

    @property
    def can_issue_in_time(self) -> bool:
        """Whether copies are under way, and `request_issue` has more issued before they land (lock held)."""
        return bool(self._flying) and not self._is_watching

    def add(self, flight: Flight) -> None:
        with self.changed:
            self._flying[flight.slot] = flight
            if not flight.is_prefetch:
                self._awaited.add(flight)
            self._has_work.notify()
            self.changed.notify_all()

    def request_issue(self) -> None:
        """Have the thread that notices landings call `issue_more`."""
        with self.changed:
            self._is_issue_requested = True
            self._has_work.notify()

    def first(self, slots: Collection[int]) -> int | None:
        """The one of these slots whose copy was issued first; None where none is on its way."""
        with self.changed:
            return next((slot for slot, flight in self._flying.items() if slot in slots and flight.marker), None)

    def follow(self, slot: int, limit_s: float) -> bool:
        """Order compute that the calling thread issues from now on after the copy to the slot.

        Returns False when that copy is not on its way any more: it has arrived, or is about to be reported as failed.
        Raises: TimeoutError when the host itself has to wait, and waits for longer than `limit_s`.
        """
        with self.changed:
            flight = self._flying.get(slot)
        if flight is None or flight.marker is None:
            return False
        if not self._copier.follow(flight.marker, limit_s):
            with self.changed:
                if self._flying.get(slot) is not flight:
                    return False
                self._awaited.add(flight)
                self._followed_at = self._followed_at or time.perf_counter()
        return True

    def settle(self, limit_s: float) -> float:
        """Wait until all that was demanded has landed. Returns the seconds from the first `follow` to the last landing.

        Raises: TimeoutError after `limit_s` seconds.
        """
        with self.changed:
            while self._awaited:
                if limit_s <= 0:
                    raise TimeoutError
                limit_s -= wait_step(self.changed, limit_s, time.monotonic)
            began, self._followed_at = self._followed_at, None
            return 0.0 if began is None else max(0.0, self._landed_at - began)

    def close(self) -> None:
        """Wait for copies under way, for `CLOSE_LIMIT_S` seconds at most."""
        self._close()

    def notice_landings(self) -> bool:
        """Wait for landings and issue copies while there are any; called by one thread. Returns False once closed."""
        while (flights := self._next_to_land()) is not None:
            errors = [flight.error or _wait(flight.marker) for flight in reversed(flights)]
            self._land(flights, errors[::-1])
            self._issue_more()
        return not self._is_closed.is_set()

    @property
    def has_work(self) -> bool:
        """Whether something flies or is to be issued (lock held)."""
        return bool(self._flying) or self._is_issue_requested

    def _next_to_land(self) -> list[Flight] | None:
        """The first copy on the link, or the first few where they are demanded, to wake once for them.

        Empty when there is more to issue first, None when there is nothing to do.
        """
        with self.changed:
            if self._is_issue_requested:
                self._is_issue_requested = False
                return []
            flying = [*islice(self._flying.values(), MOST_TOGETHER)]
            demanded = [*takewhile(lambda flight: not flight.is_prefetch, flying)]
            self._is_watching = bool(flying)
            return demanded or flying[:1] or None

    def _land(self, flights: list[Flight], errors: list[BaseException | None]) -> None:
        if not flights:
            return
        self._note_pace(flights, errors)
        with self.changed:
            self._is_watching = False
            self._landed_at = time.perf_counter()
            for flight in flights:
                del self._flying[flight.slot]  # before it lands: then the slot may be taken for another copy
        for flight, error in zip(flights, errors, strict=True):
            flight.land(error)
        with self.changed:
            self._awaited.difference_update(flights)
            self.changed.notify_all()

    def _note_pace(self, flights: list[Flight], errors: list[BaseException | None]) -> None:
        landed = [flight.began for flight, error in zip(flights, errors, strict=True) if error is None]
        self._pace.end(landed, are_demanded=not flights[0].is_prefetch)
        for flight, error in zip(flights, errors, strict=True):
            if error is not None:
                self._pace.fail(flight.began)


def _notice_landings(
    reference: "weakref.ref[Flights]", has_work: threading.Condition, is_closed: threading.Event
) -> None:
    """The body of the thread. While nothing flies it does not keep the flights alive."""
    flights = reference()
    while flights is not None and flights.notice_landings():
        with has_work:
            if not flights.has_work:
                flights = None
                if not is_closed.is_set():
                    has_work.wait()
                flights = reference()


def _close(has_work: threading.Condition, is_closed: threading.Event, thread: threading.Thread) -> None:
    with has_work:
        is_closed.set()
        has_work.notify()
    if thread is not threading.current_thread():
        thread.join(CLOSE_LIMIT_S)


def _wait(marker: Marker | None) -> BaseException | None:
    try:
        if marker is not None:
            marker.wait()
    except RuntimeError as error:
        return error
    return None
