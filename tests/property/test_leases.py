"""Leases and waves under every order of completion Hypothesis can think of, with failures, down to one slot.

Time is the test's: where a lease would wait, a transfer of Hypothesis' choice completes.
"""

import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_moe.errors import TransferError
from offload_moe.memory.mover import Arrived
from offload_moe.native.kernels import SlotTable
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import make_policy, policy_names
from offload_moe.residency.residency import Residency, SlotState
from offload_moe.residency.scheduler import Scheduler

NUM_LAYERS, NUM_EXPERTS = 2, 5
EXPERTS = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=NUM_EXPERTS, unique=True).map(sorted)


@dataclass
class Order:
    """Draws which pending transfer completes next, and whether it fails."""

    data: st.DataObject
    may_fail: bool
    memory: list[int]
    pending: list[tuple[int, int, Arrived]] = field(default_factory=list)

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        self.memory[slot] = -1
        self.pending.append((key, slot, arrived))

    def complete_one(self) -> None:
        index = self.data.draw(st.integers(0, len(self.pending) - 1), label="completes")
        key, slot, arrived = self.pending.pop(index)
        if self.may_fail and self.data.draw(st.booleans(), label="fails"):
            arrived(slot, 0, TransferError(f"expert {key} is gone"))
        else:
            self.memory[slot] = key
            arrived(slot, 1, None)

    def cancel(self, slot: int) -> bool:
        index = next((index for index, entry in enumerate(self.pending) if entry[1] == slot), None)
        if index is None or not self.data.draw(st.booleans(), label="is not under way"):
            return False
        del self.pending[index]
        return True

    def promote(self, slot: int) -> None:
        pass

    def drain(self) -> None:
        pass

    def used(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


class PumpedCondition(threading.Condition):
    """Waiting makes a transfer complete; waiting with none pending would be a deadlock."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self._order = order

    def wait(self, timeout: float | None = None) -> bool:
        assert self._order.pending, "a lease waits although nothing is on its way: deadlock"
        self._order.complete_one()
        return True


def make(num_slots: int, policy: str, data: st.DataObject, *, may_fail: bool) -> tuple[Scheduler, Order]:
    order = Order(data, may_fail, [-1] * num_slots)
    made = make_policy(policy, ExpertKeys([NUM_EXPERTS] * NUM_LAYERS), num_slots=num_slots)
    scheduler = Scheduler(
        Residency(SlotTable(NUM_LAYERS * NUM_EXPERTS, num_slots), made),
        order,
        keys=ExpertKeys([NUM_EXPERTS] * NUM_LAYERS),
    )
    scheduler.changed = PumpedCondition(order)
    return scheduler, order


def resize(scheduler: Scheduler, order: Order, num_slots: int) -> int:
    """What is on its way to a slot that goes is waited for; `order` may complete transfers while it is."""
    if num_slots < scheduler.residency.num_slots:
        scheduler.shrink(num_slots)
        del order.memory[num_slots:]
        assert all(slot < num_slots for _, slot, _ in order.pending)
    else:
        order.memory += [-1] * (num_slots - len(order.memory))
        scheduler.grow(num_slots)
    return num_slots


def check_nothing_is_held(scheduler: Scheduler) -> None:
    residency = scheduler.residency
    assert not any(residency.num_leases(slot) for slot in range(residency.num_slots))
    assert not scheduler.failed


@settings(max_examples=150, deadline=None)
@given(num_slots=st.integers(1, 6), policy=st.sampled_from(policy_names()), data=st.data())
def test_every_expert_comes_once_with_its_own_bytes(num_slots: int, policy: str, data: st.DataObject) -> None:
    scheduler, order = make(num_slots, policy, data, may_fail=False)
    for _ in range(data.draw(st.integers(1, 6))):
        layer, experts = data.draw(st.integers(0, NUM_LAYERS - 1)), data.draw(EXPERTS)
        if data.draw(st.booleans(), label="resizes"):
            num_slots = resize(scheduler, order, data.draw(st.integers(1, 7)))
        if data.draw(st.booleans(), label="prefetches"):
            scheduler.prefetch(data.draw(st.integers(0, NUM_LAYERS - 1)), data.draw(EXPERTS))
        if data.draw(st.booleans(), label="fills"):
            scheduler.fill(data.draw(st.permutations(range(NUM_LAYERS * NUM_EXPERTS))))
        seen: list[int] = []
        with scheduler.acquire(layer, experts) as lease:
            for wave in lease:
                assert 0 < len(wave) <= num_slots
                if order.pending and data.draw(st.booleans(), label="during compute"):
                    order.complete_one()
                for expert, slot in wave:
                    assert order.memory[slot] == layer * NUM_EXPERTS + expert
                    assert scheduler.residency.num_leases(slot) == 1
                    seen.append(expert)
        assert sorted(seen) == experts
        check_nothing_is_held(scheduler)


@settings(max_examples=100, deadline=None)
@given(num_slots=st.integers(1, 4), data=st.data())
def test_failures_are_raised_and_leave_nothing_behind(num_slots: int, data: st.DataObject) -> None:
    scheduler, order = make(num_slots, "lru", data, may_fail=True)
    for _ in range(4):
        layer, experts = data.draw(st.integers(0, NUM_LAYERS - 1)), data.draw(EXPERTS)
        seen: list[int] = []
        try:
            with scheduler.acquire(layer, experts) as lease:
                for wave in lease:
                    for expert, slot in wave:
                        assert order.memory[slot] == layer * NUM_EXPERTS + expert
                        seen.append(expert)
        except TransferError:
            pass
        else:
            assert sorted(seen) == experts
        while order.pending:
            order.complete_one()
        check_nothing_is_held(scheduler)
        states = [scheduler.residency.state(slot) for slot in range(num_slots)]
        assert SlotState.LOADING not in states


def test_the_pump_notices_a_lost_transfer() -> None:
    """The harness itself: a mover that forgets a transfer must be caught, not waited for."""
    order = Order(None, False, [-1])  # type: ignore[arg-type]
    order.start = lambda key, slot, arrived, is_prefetch=False: None  # type: ignore[method-assign]
    made = make_policy("lru", ExpertKeys([1]), num_slots=1)
    scheduler = Scheduler(Residency(SlotTable(1, 1), made), order, keys=ExpertKeys([1]))
    scheduler.changed = PumpedCondition(order)
    with pytest.raises(AssertionError, match="deadlock"), scheduler.acquire(0, [0]) as lease:
        list(lease)
