"""The thread that called the model, during a token pass on a native thread: `decode/span.py` in virtual time."""

from collections.abc import Sequence

from offload_moe.native.kernels import NEEDS_EXPERTS, NEEDS_SLOTS
from offload_moe.residency.accounts import Choice, note_passed, sort_found
from offload_moe.residency.lease import Lease
from offload_moe.residency.reserved import ReservedSlots
from offload_moe.residency.scheduler import Scheduler
from offload_moe.simulate.clock import VirtualClock, VirtualCondition
from offload_moe.simulate.costs import RunCosts


class Helper:
    """Serves the requests of a token pass one after another; later requests wait."""

    def __init__(self, clock: VirtualClock, scheduler: Scheduler, reserved: ReservedSlots, costs: RunCosts) -> None:
        self._clock = clock
        self._scheduler = scheduler
        self._reserved = reserved
        self._costs = costs
        self._chosen: list[Sequence[int]] = []  # by layer of the token pass: the routed experts
        self._found: list[Sequence[int]] = []  # by layer: the result of their lookup
        self._num_accounted = 0  # layers already accounted for
        self._needs: dict[int, int] = {}  # layer -> its request
        self._held: Lease | None = None
        self._is_busy = self._is_bringing = self._lends_next = False
        assert isinstance(scheduler.changed, VirtualCondition)
        scheduler.changed.listeners.append(self._check_arrivals)

    def begin(self, *, may_evict: bool) -> None:
        """Begin a token pass: reserve slots for it. may_evict: evict the least valuable experts if no slot is free."""
        self._chosen, self._found, self._num_accounted = [], [], 0
        self._may_evict = may_evict
        self._is_busy = True
        self._clock.after(self._costs.ask_host_s, self._reserve)

    def routed(self, chosen: Sequence[int], found: Sequence[int]) -> None:
        """Record the lookup of the next layer."""
        self._chosen.append(chosen)
        self._found.append(found)

    def need(self, what: int) -> None:
        """Queue a layer's request: the kernels' NEEDS_EXPERTS, or NEEDS_SLOTS, or both."""
        at = len(self._chosen) - 1
        self._needs[at] = self._needs.get(at, 0) | what
        self._attend()

    def end(self) -> None:
        """End the token pass: finish its requests, account for the remaining layers, and reclaim reserved slots."""
        while self._is_busy:
            has_happened = self._clock.run_next()
            assert has_happened, "a request of a token pass is never served"
        self._note_passed(len(self._chosen))
        self._reserved.reclaim()

    def _attend(self) -> None:
        if not self._is_busy and self._needs:
            self._is_busy = True
            num_layers = max(0, min(self._needs) - self._num_accounted)
            self._clock.after(self._costs.ask_host_s + num_layers * self._costs.account_host_s, self._give)

    def _give(self) -> None:
        at = min(self._needs)
        needs = self._needs.pop(at)
        self._note_passed(at)
        if not needs & NEEDS_EXPERTS:
            self._reserve()
            return
        chosen = self._chosen[at]
        self._held = self._scheduler.acquire(at, sorted(chosen), found=sort_found(chosen, self._found[at]))
        self._num_accounted = at + 1
        self._is_bringing, self._lends_next = True, bool(needs & NEEDS_SLOTS)
        self._check_arrivals()

    def _check_arrivals(self) -> None:
        """Wait for the whole lease: a completion wakes the thread."""
        if not self._is_bringing:
            return
        assert self._held is not None
        self._scheduler.drain_completions()
        if not self._held.have_come():
            return
        self._is_bringing = False
        if self._lends_next:
            self._reserve()
        else:
            self._rest()

    def _reserve(self) -> None:
        self._reserved.reserve(may_evict=self._may_evict)
        self._rest()

    def _rest(self) -> None:
        self._is_busy = False
        self._attend()

    def _note_passed(self, end: int) -> None:
        """Account for all layers before this one."""
        if self._held is not None:
            self._held.close()
            self._held = None
        if self._num_accounted < end:
            layers = range(self._num_accounted, end)
            choices = [Choice(self._chosen[at], self._found[at]) for at in layers]
            note_passed(self._scheduler, self._num_accounted, choices)
        self._num_accounted = max(self._num_accounted, end)
