"""Threads that wait for experts are woken by completions, not by looking again and again."""

import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload_moe.memory.arena import Arena
from offload_moe.memory.disk import DiskMover
from offload_moe.native import reads as native_reads
from offload_moe.native.kernels import SlotTable
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import LRU
from offload_moe.residency.residency import Residency
from offload_moe.residency.scheduler import Scheduler
from offload_moe.store import Record
from tests.support.disk import pread

RECORD, NUM_KEYS, NUM_SLOTS = 4096, 4, 2


class Disk:
    """A scheduler whose reads wait for a word, and in which waits are not bounded: who is not woken waits for ever."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"".join(bytes([key]) * RECORD for key in range(NUM_KEYS)))
        arena = Arena(NUM_SLOTS, RECORD)
        table = SlotTable(NUM_KEYS, NUM_SLOTS, arena.addresses)

        def record_of(key: int) -> Record:
            checksum = zlib.crc32(bytes([key]) * RECORD)
            return Record(name=f"expert {key}", path=path, offset=key * RECORD, num_bytes=RECORD, checksum=checksum)

        self.mover = DiskMover(arena, table, record_of)
        self.scheduler = Scheduler(
            Residency(table, LRU()), self.mover, keys=ExpertKeys([NUM_KEYS]), changed=self.mover.changed
        )
        self.word, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.mover.reads.read_with(self._read_at)

    def _read_at(self, descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        self.begun.release()
        self.word.acquire()
        return pread(descriptor, address, num_bytes, offset)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(native_reads, "POLL_S", 600.0)
    monkeypatch.setattr("offload_moe.memory.waiting.STEP_S", 600.0)
    disk = Disk(tmp_path / "experts")
    yield disk
    disk.word.release(100)
    disk.scheduler.close()


def in_a_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def bring(scheduler: Scheduler, expert: int) -> None:
    with scheduler.acquire(0, [expert]) as lease:
        assert [found for wave in lease for found, _ in wave] == [expert]


def has_ended(thread: threading.Thread) -> bool:
    thread.join(20)
    return not thread.is_alive()


def test_a_completion_wakes_all_who_wait(disk: Disk) -> None:
    waiting = [in_a_thread(lambda: bring(disk.scheduler, 1)) for _ in range(3)]
    assert disk.begun.acquire(timeout=20)
    time.sleep(0.05)  # so that they wait, as a rule
    disk.word.release()
    assert all(map(has_ended, waiting))
    assert disk.scheduler.counters.disk_bytes == RECORD


def test_a_slot_that_is_released_wakes_who_waits_for_one(disk: Disk) -> None:
    scheduler = disk.scheduler
    disk.word.release(10)
    with scheduler.acquire(0, [0, 1]) as lease:
        list(lease)
        waiting = in_a_thread(lambda: bring(scheduler, 3))
        time.sleep(0.05)
        assert waiting.is_alive()
    assert has_ended(waiting)


def test_reads_that_nobody_waits_for_are_entered_and_a_warm_start_goes_on(disk: Disk) -> None:
    disk.word.release(10)
    disk.scheduler.fill([3, 2, 1, 0])
    deadline = time.monotonic() + 20
    while disk.scheduler.residency.num_resident < NUM_SLOTS and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(disk.scheduler.residency.resident_keys()) == [2, 3]
