"""One slot, one mover: who may overwrite what, and what a failure leaves behind. Shares no model with `test_copies`."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from offload_moe.errors import TransferError
from offload_moe.memory.copier import Marker
from offload_moe.memory.device import Borrowed, DeviceMover, DeviceSlots
from offload_moe.memory.simulated import SimulatedCopier, SimulatedEvent, SimulatedStream
from offload_moe.native.kernels import SlotTable
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import make_policy
from offload_moe.residency.residency import Residency
from offload_moe.residency.scheduler import Scheduler

RECORD = 4096


class Records:
    """A RAM tier of one slot: the record is overwritten as soon as nobody borrows it."""

    are_resident = False

    def __init__(self) -> None:
        self.memory = torch.zeros(RECORD, dtype=torch.uint8)
        self.error: BaseException | None = None
        self.is_free = threading.Semaphore()  # one copy at a time

    def borrow(self, key: int) -> Borrowed:
        if self.error is not None:
            raise self.error
        self.is_free.acquire()
        return self._filled(key)

    def borrow_resident(self, key: int) -> Borrowed | None:
        is_here = self.are_resident and self.error is None and self.is_free.acquire(blocking=False)
        return self._filled(key) if is_here else None

    def _filled(self, key: int) -> Borrowed:
        self.memory.fill_(key)
        return self.memory, self._give_back

    def _give_back(self) -> None:
        self.memory.fill_(0xFF)
        self.is_free.release()


class EqualRecords(Records):
    """Records that all lie in the same memory, which nobody overwrites."""

    def borrow_resident(self, key: int) -> Borrowed:
        return self.memory, lambda: None


class Arrivals:
    def __init__(self) -> None:
        self.errors: list[BaseException | None] = []
        self.event = threading.Event()

    def __call__(self, slot: int, num_bytes: int, error: BaseException | None) -> None:
        self.errors.append(error)
        self.event.set()

    def wait(self) -> BaseException | None:
        assert self.event.wait(10)
        return self.errors[-1]


@pytest.fixture(autouse=True, params=[False, True], ids=["to be read", "in RAM"])
def _are_resident(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Records, "are_resident", request.param)


@pytest.fixture
def copier() -> Iterator[SimulatedCopier]:
    copier = SimulatedCopier(latency_s=0, lazy_copies=True, lazy_compute=True, defers_compute=True)
    yield copier
    copier.close()


def load(mover: DeviceMover, key: int, slot: int = 0) -> BaseException | None:
    arrived = Arrivals()
    mover.start(key, slot, arrived)
    return arrived.wait()


def read_later(stream: SimulatedStream, slot: Tensor) -> list[int]:
    """Issue compute that reads the slot; what it has read once it ran."""
    seen: list[int] = []
    stream.issue(lambda: seen.append(int(slot[0])))
    return seen


def test_a_slot_is_overwritten_only_after_its_readers_on_every_stream(copier: SimulatedCopier) -> None:
    records, slots = Records(), DeviceSlots(copier, 1, RECORD)
    mover = DeviceMover(copier, slots, records)
    assert load(mover, 1) is None
    streams = [SimulatedStream(is_lazy=True) for _ in range(3)]
    seen = []
    for stream in streams:
        with stream:
            seen.append(read_later(stream, slots.slot(0)))
            mover.used([0])
    assert load(mover, 2) is None
    assert seen == [[1], [1], [1]]
    assert int(slots.slot(0)[0]) == 2


def test_a_failed_load_does_not_forget_the_readers(copier: SimulatedCopier) -> None:
    records, slots = Records(), DeviceSlots(copier, 1, RECORD)
    mover = DeviceMover(copier, slots, records)
    assert load(mover, 1) is None
    seen = read_later(copier.compute, slots.slot(0))
    mover.used([0])
    records.error = TransferError("disk gone")
    assert load(mover, 2) is records.error
    records.error = None
    assert load(mover, 3) is None
    assert seen == [1]
    assert slots.slot(0).eq(3).all()


def test_a_device_that_fails_is_a_transfer_error(copier: SimulatedCopier, monkeypatch: pytest.MonkeyPatch) -> None:
    mover = DeviceMover(copier, DeviceSlots(copier, 1, RECORD), Records())

    def fail(source: Tensor, destination: Tensor) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nlong explanation")

    monkeypatch.setattr(copier, "issue_copy", fail)
    error = load(mover, 7)
    assert isinstance(error, TransferError)
    assert str(error).startswith("Copying expert record 7 (4096 bytes) to the device failed: CUDA error: an illegal")
    assert "\n" not in str(error)
    monkeypatch.undo()
    assert load(mover, 7) is None


def test_slots_do_not_overlap_and_may_be_made_in_inference_mode(copier: SimulatedCopier) -> None:
    with torch.inference_mode():
        slots = DeviceSlots(copier, 7, RECORD, chunk_bytes=3 * RECORD)
    for index in range(7):
        slots.slot(index).fill_(index)
    assert [int(slots.slot(index).float().mean()) for index in range(7)] == list(range(7))


def test_a_lazy_stream_runs_in_order_and_only_when_waited_for() -> None:
    stream, done = SimulatedStream(is_lazy=True), list[int]()
    for index in range(3):
        stream.issue(lambda index=index: done.append(index))
    assert not done
    stream.wait_for(2)
    assert done == [0, 1]
    stream.close()
    assert done == [0, 1, 2]


def test_an_event_means_what_was_issued_when_it_was_recorded(copier: SimulatedCopier) -> None:
    other, order = SimulatedStream(), list[str]()
    event = copier.new_event()
    event.synchronize()  # never recorded: done
    copier.compute.issue(lambda: order.append("before"))
    event.record(copier.compute)
    other.wait_event(event)
    other.issue(lambda: order.append("other"))
    copier.compute.issue(lambda: order.append("after"))
    event.record(copier.compute)
    other.synchronize()
    assert order == ["before", "other"]
    event.synchronize()
    assert order == ["before", "other", "after"]
    other.close()


def make_scheduler(copier: SimulatedCopier, num_slots: int) -> tuple[Scheduler, DeviceSlots]:
    slots = DeviceSlots(copier, num_slots, RECORD)
    mover = DeviceMover(copier, slots, Records())
    policy = make_policy("lru", ExpertKeys([8]), num_slots=num_slots)
    return Scheduler(
        Residency(SlotTable(8, num_slots), policy), mover, keys=ExpertKeys([8]), flights=mover.flights
    ), slots


def test_compute_follows_a_copy_that_the_host_does_not_wait_for(copier: SimulatedCopier) -> None:
    scheduler, slots = make_scheduler(copier, 2)
    with scheduler.acquire(0, [1, 2]) as lease:
        seen = {expert: read_later(copier.compute, slots.slot(slot)) for wave in lease for expert, slot in wave}
    assert seen == {1: [], 2: []}
    copier.compute.synchronize()
    assert seen == {1: [1], 2: [2]}
    scheduler.settle()
    assert scheduler.resident(0, range(8)) == [1, 2]


def test_compute_on_the_host_waits_for_each_copy_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    is_awaited, follow = threading.Event(), SimulatedCopier.follow

    def let_it_come(self: SimulatedCopier, copied: Marker, limit_s: float) -> bool:
        is_awaited.set()
        return follow(self, copied, limit_s)

    monkeypatch.setattr(SimulatedCopier, "follow", let_it_come)
    copier = SimulatedCopier(latency_s=0.01, delay_s=lambda: is_awaited.wait(60) * 0.0)
    scheduler, slots = make_scheduler(copier, 3)
    with scheduler.acquire(0, [1, 2, 3]) as lease:
        found = {expert: int(slots.slot(slot)[0]) for wave in lease for expert, slot in wave}
    assert found == {1: 1, 2: 2, 3: 3}
    assert scheduler.counters.stall_s >= 0.01
    scheduler.close()


def test_a_lease_that_is_left_in_the_middle_protects_what_it_read(copier: SimulatedCopier) -> None:
    scheduler, slots = make_scheduler(copier, 1)
    with pytest.raises(KeyboardInterrupt), scheduler.acquire(0, [1, 2]) as lease:
        next(iter(lease))
        seen = read_later(copier.compute, slots.slot(0))
        raise KeyboardInterrupt
    with scheduler.acquire(0, [3]) as lease:
        assert list(lease) == [[(3, 0)]]
        copier.compute.synchronize()
        assert slots.slot(0).eq(3).all()
    assert seen == [1]


def test_a_hold_protects_what_it_read(copier: SimulatedCopier) -> None:
    scheduler, _ = make_scheduler(copier, 1)
    with scheduler.acquire(0, [1]) as lease:
        list(lease)
    scheduler.settle()
    held = scheduler.hold(0, [1])
    assert held == [0]
    seen = read_later(copier.compute, scheduler.mover._slots.slot(0))
    scheduler.release_held(held)
    with scheduler.acquire(0, [2]) as lease:
        assert list(lease) == [[(2, 0)]]
    scheduler.settle()
    assert seen == [1]


@pytest.mark.parametrize("defers_compute", [False, True])
def test_a_stalled_link_is_reported_and_the_next_question_works(
    defers_compute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = SimulatedCopier(latency_s=0, defers_compute=defers_compute)
    scheduler, slots = make_scheduler(copier, 2)
    link_works = threading.Event()
    issue_copy = copier.issue_copy

    def stall(source: Tensor, destination: Tensor) -> None:
        copier.current_stream().issue(lambda: link_works.wait(60) and None)
        issue_copy(source, destination)
        scheduler.stall_limit_s = 0.05  # not before: reading takes what it takes

    expected = "Copies of experts to the device" if defers_compute else "1 experts of layer 0"
    with monkeypatch.context() as patch:
        patch.setattr(copier, "issue_copy", stall)
        with pytest.raises(TransferError, match=f"{expected} did not arrive"):
            with scheduler.acquire(0, [1]) as lease:
                list(lease)
            scheduler.settle()
    link_works.set()
    scheduler.stall_limit_s = 60
    with scheduler.acquire(0, [1]) as lease:
        ((_, slot),) = next(iter(lease))
        copier.compute.synchronize()
        assert slots.slot(slot).eq(1).all()
    scheduler.close()


def test_a_copy_that_fails_under_way_is_reported_and_tried_again(
    copier: SimulatedCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, slots = make_scheduler(copier, 2)

    def fail(event: SimulatedEvent, limit_s: float | None = None) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(SimulatedEvent, "synchronize", fail)
    scheduler.flights = None  # whoever waits for the slot to be resident
    with pytest.raises(TransferError, match=r"record 1 .* failed: CUDA error"), scheduler.acquire(0, [1]) as lease:
        list(lease)
    monkeypatch.undo()
    with scheduler.acquire(0, [1]) as lease:
        ((_, slot),) = next(iter(lease))
        assert slots.slot(slot).eq(1).all()
    assert scheduler.mover.pace.busy_s() == 0.0


def test_few_prefetches_are_issued_at_once_and_demands_overtake_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    copier, link_works, order = SimulatedCopier(), threading.Event(), list[int]()
    are_issued = threading.Semaphore(0)
    slots = DeviceSlots(copier, 6, RECORD)
    mover, arrived = DeviceMover(copier, slots, EqualRecords()), Arrivals()
    slot_of = {slots.slot(slot).data_ptr(): slot for slot in range(6)}

    def stall(source: Tensor, destination: Tensor) -> None:
        order.append(slot_of[destination.data_ptr()])
        are_issued.release()
        copier.current_stream().issue(lambda: link_works.wait(60) and None)

    monkeypatch.setattr(copier, "issue_copy", stall)
    with mover.flights.changed:  # the thread that would watch the first one's copy finds all of them
        for slot in range(5):
            mover.start(slot, slot, arrived, is_prefetch=True)
    for _ in range(2):
        assert are_issued.acquire(timeout=10)
    mover.start(5, 5, arrived)
    mover.promote(3)
    for _ in range(2):  # here, or by the thread where it does not watch the link yet
        assert are_issued.acquire(timeout=10)
    assert mover.cancel(2)
    assert not mover.cancel(0)
    assert order == [0, 1, 5, 3]
    link_works.set()
    while len(arrived.errors) < 5:
        assert arrived.wait() is None
    assert order == [0, 1, 5, 3, 4]
    mover.close()
