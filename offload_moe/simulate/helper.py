"""The thread that called the model, while a native thread takes a token pass: `decode/span.py` in virtual time."""

from collections.abc import Sequence
from functools import partial

from offload_moe.native.kernels import NEEDS_EXPERTS, NEEDS_SLOTS
from offload_moe.residency.accounts import note_passed, sort_found
from offload_moe.residency.lease import Lease
from offload_moe.residency.reserved import DRAIN_INTERVAL_S, ReservedSlots
from offload_moe.residency.scheduler import Scheduler
from offload_moe.simulate.clock import VirtualClock, VirtualCondition
from offload_moe.simulate.costs import RunCosts


class Helper:
    """Gives a token pass what it asks for, one thing after another; whoever asks meanwhile waits."""

    def __init__(self, clock: VirtualClock, scheduler: Scheduler, reserved: ReservedSlots, costs: RunCosts) -> None:
        self._clock = clock
        self._scheduler = scheduler
        self._reserved = reserved
        self._costs = costs
        self._chosen: list[Sequence[int]] = []  # of each layer of the token pass, what its router chose
        self._found: list[Sequence[int]] = []  # and how it was found
        self._num_told = 0  # layers that have been accounted for
        self._needs: dict[int, int] = {}  # layer -> what it needs
        self._held: Lease | None = None
        self._is_busy = self._is_bringing = self._lends_next = False
        assert isinstance(scheduler.changed, VirtualCondition)
        scheduler.changed.listeners.append(self._look_whether_all_have_come)

    def begin(self, *, may_evict: bool) -> None:
        """A ride begins: lend it slots. may_evict: for want of free ones, others than those that are worth least."""
        self._chosen, self._found, self._num_told = [], [], 0
        self._may_evict = may_evict
        self._is_busy = True
        self._clock.after(self._costs.ask_host_s, self._lend)

    def routed(self, chosen: Sequence[int], found: Sequence[int]) -> None:
        """The next layer has looked for its experts."""
        self._chosen.append(chosen)
        self._found.append(found)

    def need(self, what: int) -> None:
        """That layer wants something: the kernels' NEEDS_EXPERTS, or NEEDS_SLOTS, or both."""
        at = len(self._chosen) - 1
        self._needs[at] = self._needs.get(at, 0) | what
        self._attend()

    def end(self) -> None:
        """The ride is over: finish what was asked for, account for the rest, and take back what was lent."""
        while self._is_busy:
            has_happened = self._clock.run_next()
            assert has_happened, "nobody brings what a token pass asked for"
        self._note_passed(len(self._chosen))
        self._reserved.reclaim()

    def _attend(self) -> None:
        if not self._is_busy and self._needs:
            self._is_busy = True
            num_layers = max(0, min(self._needs) - self._num_told)
            self._clock.after(self._costs.ask_host_s + num_layers * self._costs.account_host_s, self._give)

    def _give(self) -> None:
        at = min(self._needs)
        needs = self._needs.pop(at)
        self._note_passed(at)
        if not needs & NEEDS_EXPERTS:
            self._lend()
            return
        chosen = self._chosen[at]
        self._held = self._scheduler.acquire(at, sorted(chosen), found=sort_found(chosen, self._found[at]))
        self._num_told = at + 1
        self._is_bringing, self._lends_next = True, bool(needs & NEEDS_SLOTS)
        self._wait(self._held)

    def _wait(self, lease: Lease) -> None:
        """For all of the lease; reads of the token pass are looked for every now and then only."""
        if lease is self._held:
            self._look_whether_all_have_come()
            if self._is_bringing:
                self._clock.after(DRAIN_INTERVAL_S, partial(self._wait, lease))

    def _look_whether_all_have_come(self) -> None:
        if not self._is_bringing:
            return
        assert self._held is not None
        self._scheduler.drain_completions()
        if not self._held.have_come():
            return
        self._is_bringing = False
        if self._lends_next:
            self._lend()
        else:
            self._rest()

    def _lend(self) -> None:
        self._reserved.lend(may_evict=self._may_evict)
        self._rest()

    def _rest(self) -> None:
        self._is_busy = False
        self._attend()

    def _note_passed(self, end: int) -> None:
        """Account for the layers before this one."""
        if self._held is not None:
            self._held.close()
            self._held = None
        if self._num_told < end:
            note_passed(
                self._scheduler, self._num_told, self._chosen[self._num_told : end], self._found[self._num_told : end]
            )
        self._num_told = max(self._num_told, end)
