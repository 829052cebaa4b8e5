"""Leases and waves with a mover whose transfers finish when, and in the order, the test says."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from offload_moe.errors import TransferError
from offload_moe.memory.arena import Arena
from offload_moe.memory.mover import Arrived, Mover
from offload_moe.memory.transfers import Transfers
from offload_moe.memory.waiting import STEP_S
from offload_moe.native.kernels import DONE, DROPPED, FAILED, READING, Completion, SlotTable
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import make_policy
from offload_moe.residency.records import RamRecords
from offload_moe.residency.reserved import PassAccounts, ReservedSlots
from offload_moe.residency.residency import Residency
from offload_moe.residency.scheduler import Scheduler
from offload_moe.residency.tier import FILL_DEPTH

NUM_LAYERS, NUM_EXPERTS = 4, 8


class ManualMover:
    """Writes the key into `memory[slot]` when told to; a lease must never see a slot before that."""

    def __init__(self, num_slots: int) -> None:
        self.memory = [-1] * num_slots
        self.pending: list[tuple[int, int, Arrived]] = []
        self.under_way: set[int] = set()
        self.num_used = 0
        self.on_start: Callable[[], None] = lambda: None

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        self.memory[slot] = -1
        self.pending.append((key, slot, arrived))
        self.on_start()

    def finish(self, index: int = 0, error: BaseException | None = None) -> None:
        key, slot, arrived = self.pending.pop(index)
        if error is None:
            self.memory[slot] = key
        arrived(slot, 100, error)

    def cancel(self, slot: int) -> bool:
        waiting = [entry for entry in self.pending if entry[1] == slot and entry[0] not in self.under_way]
        self.pending = [entry for entry in self.pending if entry not in waiting]
        return bool(waiting)

    def promote(self, slot: int) -> None:
        pass

    def drain(self) -> None:
        pass

    def used(self, slots: Sequence[int]) -> None:
        self.num_used += len(slots)

    def close(self) -> None:
        pass


class ThreadMover(ManualMover):
    """Finishes transfers from threads, in random order after random delays."""

    def __init__(self, num_slots: int, seed: int) -> None:
        super().__init__(num_slots)
        self.random = random.Random(seed)
        self.on_start = lambda: threading.Timer(self.random.random() * 0.002, self.finish_any).start()
        self.lock = threading.Lock()

    def finish_any(self) -> None:
        with self.lock:
            key, slot, arrived = self.pending.pop(self.random.randrange(len(self.pending)))
        self.memory[slot] = key
        arrived(slot, 100, None)


def make_scheduler(num_slots: int, mover: Mover, **options: Any) -> Scheduler:
    policy = make_policy("lru", ExpertKeys([NUM_EXPERTS] * NUM_LAYERS), num_slots=num_slots)
    table = SlotTable(NUM_LAYERS * NUM_EXPERTS, num_slots)
    return Scheduler(Residency(table, policy), mover, keys=ExpertKeys([NUM_EXPERTS] * NUM_LAYERS), **options)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 32])
def test_every_expert_is_seen_once_with_its_own_bytes(num_slots: int) -> None:
    mover = ThreadMover(num_slots, seed=num_slots)
    scheduler = make_scheduler(num_slots, mover)
    draw = random.Random(0)
    for step in range(60):
        layer, experts = step % NUM_LAYERS, sorted(draw.sample(range(NUM_EXPERTS), 4))
        seen = []
        with scheduler.acquire(layer, experts) as lease:
            for wave in lease:
                assert len(wave) <= num_slots
                for expert, slot in wave:
                    assert mover.memory[slot] == layer * NUM_EXPERTS + expert
                    seen.append(expert)
        assert sorted(seen) == experts
    counters = scheduler.counters
    assert counters.num_accesses == 240
    assert counters.disk_bytes == 100 * (counters.num_misses + 0)
    if num_slots == 32:
        assert counters.num_evictions == 0
        assert counters.num_misses <= 32


def test_hits_come_first_and_misses_as_they_arrive() -> None:
    mover = ManualMover(8)
    scheduler = make_scheduler(8, mover)
    with scheduler.acquire(0, [5]) as lease:
        mover.finish()
        assert [wave[0][0] for wave in lease] == [5]
    with scheduler.acquire(0, [1, 2, 5]) as lease:
        waves = iter(lease)
        assert [expert for expert, _ in next(waves)] == [5]
        mover.finish(1)
        assert [expert for expert, _ in next(waves)] == [2]
        mover.finish(0)
        assert [expert for expert, _ in next(waves)] == [1]
        assert next(waves, None) is None
    assert (scheduler.counters.num_hits, scheduler.counters.num_misses) == (1, 3)


def test_what_is_computed_stays_leased_while_nobody_of_the_layer_wants_its_slot() -> None:
    mover = ManualMover(2)
    scheduler = make_scheduler(2, mover)
    with scheduler.acquire(0, [1, 2]) as lease:
        waves = iter(lease)
        mover.finish()
        assert [expert for expert, _ in next(waves)] == [1]
        mover.finish()
        assert [expert for expert, _ in next(waves)] == [2]
        assert mover.num_used == 0
        assert scheduler.prefetch(1, [3]) == 0
        assert next(waves, None) is None
    assert mover.num_used == 2
    assert scheduler.prefetch(1, [3]) == 1


def test_what_is_computed_makes_room_for_others_of_the_layer() -> None:
    mover = ManualMover(2)
    scheduler = make_scheduler(2, mover)
    with scheduler.acquire(0, [1, 2, 3]) as lease:
        waves = iter(lease)
        mover.finish()
        assert [expert for expert, _ in next(waves)] == [1]
        mover.finish()
        assert [expert for expert, _ in next(waves)] == [2]
        assert (mover.num_used, [key for key, *_ in mover.pending]) == (1, [3])
        mover.finish()
        assert [expert for expert, _ in next(waves)] == [3]
    assert mover.num_used == 3


def test_prefetch_in_flight_is_a_delayed_hit() -> None:
    mover = ManualMover(4)
    scheduler = make_scheduler(4, mover)
    assert scheduler.prefetch(1, [3]) == 1
    with scheduler.acquire(1, [3]) as lease:
        mover.finish()
        assert [[expert for expert, _ in wave] for wave in lease] == [[3]]
    assert scheduler.counters.num_delayed_hits == 1


def test_prefetch_never_takes_a_leased_slot() -> None:
    mover = ManualMover(1)
    scheduler = make_scheduler(1, mover)
    with scheduler.acquire(0, [0]) as lease:
        mover.finish()
        for _ in lease:
            assert scheduler.prefetch(0, [1]) == 0
    assert scheduler.prefetch(0, [1]) == 1


def test_a_failed_transfer_names_itself_and_the_next_acquire_works() -> None:
    mover = ManualMover(2)
    scheduler = make_scheduler(2, mover)
    with pytest.raises(TransferError, match="disk gone"), scheduler.acquire(0, [0, 1]) as lease:
        mover.finish(error=TransferError("disk gone"))
        list(lease)
    mover.finish()
    with scheduler.acquire(0, [0, 1]) as lease:
        mover.finish()
        assert sorted(expert for wave in lease for expert, _ in wave) == [0, 1]


def test_a_stalled_transfer_is_reported_not_waited_for() -> None:
    mover = ManualMover(2)
    scheduler = make_scheduler(2, mover, stall_limit_s=0.05)
    with (
        pytest.raises(TransferError, match="2 experts of layer 3 did not arrive"),
        scheduler.acquire(3, [0, 1]) as lease,
    ):
        list(lease)


def test_a_record_that_cannot_be_borrowed_gives_its_slot_back() -> None:
    mover = ManualMover(1)
    records = RamRecords(make_scheduler(1, mover, stall_limit_s=0.05), Arena(num_slots=1, slot_bytes=4096))
    with pytest.raises(TransferError, match="did not arrive"):
        records.borrow(0)
    mover.finish()
    mover.on_start = mover.finish
    _, give_back = records.borrow(1)
    assert mover.memory == [1]
    give_back()


def test_time_in_which_the_process_was_stopped_is_no_stall() -> None:
    """The clock jumps by an hour in the first wait, and the expert arrives in the second."""
    mover = ManualMover(2)
    scheduler = make_scheduler(2, mover, clock=lambda: time.monotonic() + jumps[0], stall_limit_s=30)
    jumps, wait = [0.0], scheduler.changed.wait

    def stopped(limit_s: float) -> bool:
        assert limit_s <= STEP_S
        if jumps[0]:
            mover.finish()
            return True
        jumps[0] = 3600.0
        return wait(0)

    scheduler.changed.wait = stopped
    with scheduler.acquire(3, [1]) as lease:
        assert [expert for wave in lease for expert, _ in wave] == [1]


def test_a_pool_that_shrinks_does_not_count_time_in_which_the_process_was_stopped() -> None:
    mover = ManualMover(2)
    times = iter(range(0, 10**6, 3600))
    scheduler = make_scheduler(2, mover, clock=lambda: float(next(times)), stall_limit_s=30)
    scheduler.prefetch(0, [0, 1])
    calls = []

    def stopped(limit_s: float) -> bool:
        calls.append(limit_s)
        if len(calls) == 2:
            mover.finish()
            mover.finish()
        return True

    scheduler.changed.wait = stopped
    scheduler.shrink(1)
    assert len(calls) == 2


def test_two_threads_share_two_slots() -> None:
    mover = ThreadMover(2, seed=1)
    scheduler = make_scheduler(2, mover)
    errors: list[BaseException] = []

    def work(layer: int) -> None:
        try:
            for _ in range(20):
                with scheduler.acquire(layer, [0, 1, 2]) as lease:
                    for wave in lease:
                        for expert, slot in wave:
                            assert mover.memory[slot] == layer * NUM_EXPERTS + expert
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)


def test_what_is_resident_can_be_held_at_once() -> None:
    mover = ManualMover(4)
    scheduler = make_scheduler(4, mover)
    assert scheduler.hold(1, [0, 3]) is None
    assert not mover.pending
    with scheduler.acquire(1, [0, 3]) as lease:
        mover.finish()
        mover.finish()
        slots = {expert: slot for wave in lease for expert, slot in wave}
    before = scheduler.counters.copy()
    held = scheduler.hold(1, [0, 3])
    assert held == [slots[0], slots[3]]
    since = scheduler.counters.since(before)
    assert (since.num_acquires, since.num_hits, since.num_waves, since.num_misses) == (1, 2, 1, 0)
    assert all(scheduler.residency.num_leases(slot) == 1 for slot in held)
    assert scheduler.prefetch(2, [0, 1, 2]) == 2  # two slots are free, the held ones are not evicted
    assert scheduler.hold(2, [0]) is None  # on its way is not here
    assert scheduler.hold(1, [0, 4]) is None  # one of them is not here: none is held
    assert [scheduler.residency.num_leases(slot) for slot in held] == [1, 1]
    scheduler.release_held(held)
    assert all(scheduler.residency.num_leases(slot) == 0 for slot in held)
    mover.finish()
    assert scheduler.hold(2, [0]) is not None
    assert scheduler.counters.num_useful_prefetches == 1


def test_the_short_way_tells_the_observer() -> None:
    mover = ManualMover(2)
    scheduler = make_scheduler(2, mover)
    with scheduler.acquire(0, [1]) as lease:
        mover.finish()
        list(lease)

    class Observer:
        def __init__(self) -> None:
            self.calls: list[tuple[int, list[int], list[int]]] = []

        def acquired(self, layer: int, arriving: list[int], missing: list[int]) -> None:
            self.calls.append((layer, arriving, missing))

        def prefetched(self, layer: int, num_started: int) -> None:
            raise AssertionError

    scheduler.observer = observer = Observer()
    slots = scheduler.hold(0, [1])
    assert slots is not None
    scheduler.release_held(slots)
    assert observer.calls == [(0, [], [])]


def key_of(layer: int, expert: int) -> int:
    return layer * NUM_EXPERTS + expert


def test_a_wrong_guess_is_dropped_unread_and_its_slot_is_free() -> None:
    mover = ManualMover(3)
    scheduler = make_scheduler(3, mover)
    assert scheduler.prefetch(1, [3, 4, 5]) == 3
    mover.under_way = {key_of(1, 5)}
    with scheduler.acquire(1, [4]) as lease:
        assert [key for key, _, _ in mover.pending] == [key_of(1, 4), key_of(1, 5)]  # too late for the last
        mover.finish()
        assert [[expert for expert, _ in wave] for wave in lease] == [[4]]
    assert scheduler.counters.num_cancelled_prefetches == 1
    assert scheduler.residency.num_free == 1
    mover.finish()
    assert scheduler.residency.find(key_of(1, 5)) is not None


def test_guesses_for_later_layers_stay_and_stale_ones_go() -> None:
    mover = ManualMover(4)
    scheduler = make_scheduler(4, mover)
    scheduler.prefetch(2, [3])
    scheduler.prefetch(0, [5])
    with scheduler.acquire(1, [4]):
        assert [key for key, _, _ in mover.pending] == [key_of(2, 3), key_of(1, 4)]
    assert scheduler.counters.num_cancelled_prefetches == 1


def test_a_warm_start_is_no_guess() -> None:
    mover = ManualMover(4)
    scheduler = make_scheduler(4, mover)
    scheduler.fill([key_of(1, 5)])
    with scheduler.acquire(1, [4]):
        assert [key for key, _, _ in mover.pending] == [key_of(1, 5), key_of(1, 4)]


def test_half_of_a_full_pool_is_computed_while_what_follows_is_loaded() -> None:
    mover = ManualMover(4)
    scheduler = make_scheduler(4, mover)
    with scheduler.acquire(0, range(8)) as lease:
        for _ in range(4):
            mover.finish()
        waves = iter(lease)
        assert len(next(waves)) == 2
        assert not mover.pending
        assert len(next(waves)) == 2
        assert len(mover.pending) == 2  # on their way while the second half is computed
        mover.finish()
        mover.finish()
        assert sorted(expert for expert, _ in next(waves)) == [4, 5]
        assert len(mover.pending) == 2


def test_a_warm_start_fills_free_slots_in_order_a_few_at_a_time_and_evicts_nothing() -> None:
    mover = ManualMover(6)
    scheduler = make_scheduler(6, mover)
    scheduler.fill([9, 8, 7, 6, 5, 4, 3, 2])
    arrived = []
    while mover.pending:
        assert len(mover.pending) <= FILL_DEPTH
        arrived.append(mover.pending[0][0])
        mover.finish()
    assert arrived == [9, 8, 7, 6, 5, 4]
    assert scheduler.residency.num_evictions == 0


def test_a_demand_finds_room_during_a_warm_start() -> None:
    mover = ManualMover(6)
    scheduler = make_scheduler(6, mover)
    scheduler.fill(range(8, 24))
    with scheduler.acquire(0, [0]) as lease:
        assert [key for key, _, _ in mover.pending][-1] == 0
        mover.finish(len(mover.pending) - 1)
        assert [[expert for expert, _ in wave] for wave in lease] == [[0]]


class ScriptedReader:
    """A reader in which reads end when, and as, the test says; token passes fetch by hand, too."""

    def __init__(self) -> None:
        self.table: SlotTable | None = None
        self.reserved: list[int] = []
        self.submitted: list[tuple[int, int]] = []
        self.told: list[Completion] = []

    @property
    def num_completions(self) -> int:
        return len(self.told)

    def completions(self) -> list[Completion]:
        told, self.told = self.told, []
        return told

    def tell(self, *completions: Completion) -> None:
        """This happens to slots, in the table, too."""
        assert self.table is not None
        for completion in completions:
            if completion.state == READING:
                assert self.table.admit(completion.key, completion.slot)
            elif completion.state == DROPPED:
                self.table.reserve(completion.slot)
            elif completion.state == DONE:
                self.table.arrive(completion.slot)
        self.told += completions

    def submit(self, key: int, slot: int, *, is_prefetch: bool = False) -> None:
        self.submitted.append((key, slot))

    def demand(self, key: int) -> None:
        pass

    def cancel(self, key: int) -> bool:
        return False

    def num_bytes(self, key: int) -> int:
        return 100

    def reserve(self, slot: int) -> None:
        self.reserved.append(slot)

    def need_below(self, least_slots: int) -> None:
        pass

    def reclaim(self) -> list[int]:
        slots, self.reserved = self.reserved, []
        return slots


def scripted(num_slots: int, **options: Any) -> tuple[Scheduler, ScriptedReader, ReservedSlots]:
    """A scheduler, its reader, and slots for token passes."""
    reader, changed = ScriptedReader(), threading.Condition()
    transfers = Transfers(reader, changed)
    scheduler = make_scheduler(num_slots, transfers, changed=changed, **options)
    transfers.account_to(PassAccounts(scheduler))
    reader.table = scheduler.residency.table
    scheduler.reserved = reserved = ReservedSlots(scheduler, reader)
    return scheduler, reader, reserved


def test_a_pool_shrinks_though_a_guess_is_dropped_after_its_run() -> None:
    scheduler, reader, reserved = scripted(8, stall_limit_s=0.5)
    for slot in range(8):
        scheduler.residency.reserve(may_evict=False)
        reader.reserve(slot)
    guessed = reader.reserved.pop()
    reader.tell(Completion(3, guessed, READING, was_prefetch=True))
    reserved.reclaim()  # the run has ended
    reader.tell(Completion(3, guessed, DROPPED, was_prefetch=True))
    reader.reserve(guessed)
    scheduler.shrink(guessed)
    assert scheduler.residency.num_slots == guessed == 7
    assert scheduler.residency.num_reserved == 0


def test_a_slot_that_was_dropped_and_filled_again_before_anybody_looked_is_entered_in_order() -> None:
    scheduler, reader, _ = scripted(4)
    scheduler.residency.reserve(may_evict=False)
    reader.tell(
        Completion(3, 0, READING, was_prefetch=True),
        Completion(3, 0, DROPPED, was_prefetch=True),
        Completion(5, 0, READING),
        Completion(5, 0, DONE),
    )
    with scheduler.acquire(0, [5]) as lease:
        assert [list(wave) for wave in lease] == [[(5, 0)]]
    counters = scheduler.counters
    assert (counters.num_hits, counters.disk_bytes) == (1, 100)
    assert (counters.num_prefetches, counters.num_cancelled_prefetches) == (1, 1)


def test_a_read_of_a_token_pass_that_has_failed_frees_its_slot() -> None:
    scheduler, reader, _ = scripted(4)
    scheduler.residency.reserve(may_evict=False)
    reader.tell(Completion(3, 0, READING), Completion(3, 0, FAILED, error=5))
    with scheduler.changed:
        scheduler.drain_completions()
    assert (scheduler.residency.find(3), scheduler.residency.num_free) == (None, 4)


def test_a_read_that_has_failed_fails_whoever_waits_for_it() -> None:
    scheduler, reader, _ = scripted(4)
    with scheduler.acquire(0, [3]) as lease:
        ((key, slot),) = reader.submitted
        reader.tell(Completion(key, slot, FAILED, error=5))
        with pytest.raises(TransferError, match="record 3 failed"):
            list(lease)
    assert scheduler.residency.num_free == 4
