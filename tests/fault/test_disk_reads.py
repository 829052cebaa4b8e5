"""Disks that fail: retried where it may pass, else an error that names the expert, the file and the offset."""

import errno
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offload_moe.errors import TransferError
from offload_moe.memory import disk, record_file, workers
from offload_moe.memory.arena import Arena
from offload_moe.memory.disk import PART_BYTES, DiskMover
from offload_moe.memory.record_file import RecordFile
from offload_moe.memory.workers import TransferWorkers
from offload_moe.store import Record
from offload_moe.store.manifest import Place
from offload_moe.store.reading import read_checked
from tests.support.disk import read

RECORD = 8192


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experts.bin"
    path.write_bytes(torch.randint(0, 256, (4 * RECORD,), dtype=torch.uint8).numpy().tobytes())
    return path


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RETRY_PAUSES_S", (0.001, 0.001))


def record_in(file: Path, content: bytes, num_bytes: int = RECORD) -> Callable[[int], Record]:
    def record_of(key: int) -> Record:
        offset = key * num_bytes
        return Record(
            name=f"expert {key} of layer 0",
            path=file,
            offset=offset,
            num_bytes=num_bytes,
            checksum=zlib.crc32(content[offset : offset + num_bytes]),
        )

    return record_of


@pytest.fixture
def arena() -> Arena:
    return Arena(2, RECORD)


@pytest.fixture
def mover(file: Path, arena: Arena) -> Iterator[DiskMover]:
    mover = DiskMover(arena, record_in(file, file.read_bytes()))
    yield mover
    mover.close()


def failing(times: int, number: int) -> Callable[..., int]:
    """`os.preadv` that fails the first times."""
    real, left = os.preadv, [times]

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(descriptor, buffers, offset)

    return preadv


def test_an_input_output_error_that_passes_is_not_noticed(mover: DiskMover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", failing(2, errno.EIO))
    assert read(mover, 1) == (RECORD, None)


def test_one_that_stays_names_expert_file_and_offset_and_the_next_read_works(
    mover: DiskMover, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", failing(1000, errno.EIO))
    num_bytes, error = read(mover, 1)
    assert num_bytes == 0
    assert isinstance(error, TransferError)
    for part in ("expert 1 of layer 0", str(file), f"offset {RECORD}", "Input/output error"):
        assert part in str(error)
    monkeypatch.undo()
    assert read(mover, 1) == (RECORD, None)


def test_short_reads_are_continued(mover: DiskMover, arena: Arena, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:4096]], offset))
    assert read(mover, 2) == (RECORD, None)
    assert arena.slot(0).numpy().tobytes() == file.read_bytes()[2 * RECORD : 3 * RECORD]


def test_a_transfer_that_went_wrong_once_is_read_again(mover: DiskMover, monkeypatch: pytest.MonkeyPatch) -> None:
    real, is_first = disk.crc32, [True]

    def crc32(view: memoryview) -> int:
        wrong, is_first[0] = is_first[0], False
        return real(view) ^ wrong

    monkeypatch.setattr(disk, "crc32", crc32)
    assert read(mover, 0) == (RECORD, None)


def test_a_truncated_file_that_is_put_back_is_read_again(mover: DiskMover, file: Path) -> None:
    content = file.read_bytes()
    assert read(mover, 0) == (RECORD, None)
    os.truncate(file, RECORD + 100)
    _, error = read(mover, 1)
    assert isinstance(error, TransferError)
    assert "short read, 100 of 8192" in str(error)
    fresh = file.with_name("fresh")
    fresh.write_bytes(content)
    fresh.rename(file)
    assert read(mover, 1) == (RECORD, None)


def test_a_file_that_vanished_is_found_again(mover: DiskMover, file: Path) -> None:
    hidden = file.with_name("hidden")
    file.rename(hidden)
    _, error = read(mover, 1)
    assert isinstance(error, TransferError)
    assert "No such file" in str(error)
    hidden.rename(file)
    assert read(mover, 1) == (RECORD, None)


def test_direct_reads_that_are_refused_become_buffered_and_it_is_said_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.preadv
    opened = RecordFile(file)
    if not opened.is_direct:
        pytest.skip("the file system of the temporary folder has no direct reads")
    monkeypatch.setattr(record_file._CachedPages, "hold", lambda self, offset, num_bytes: False)

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor == opened._direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    buffer = bytearray(RECORD)
    for _ in range(3):
        assert opened.read_into(memoryview(buffer), RECORD) == RECORD
    assert bytes(buffer) == file.read_bytes()[RECORD : 2 * RECORD]
    assert not opened.is_direct
    assert [r.message for r in caplog.records if "page cache" in r.message] == [caplog.records[0].message]
    opened.close()


def test_what_is_cached_is_copied_and_what_is_not_is_read_around_the_cache(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    opened = RecordFile(file)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: used.append(fd) or real(fd, buffers, offset))
    memory = memoryview(torch.from_numpy(Arena(1, RECORD).slot(0).numpy()).numpy().data)
    file.read_bytes()  # now it is cached
    opened.read_into(memory, 0)
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    opened.read_into(memory, 0)
    if not opened.is_direct or opened._pages is None or opened._pages._base is None:
        pytest.skip("no direct reads here")
    assert used[0] == opened._cached
    assert used[1] == opened._direct
    opened.close()


def test_without_preadv_and_without_mincore_it_seeks_and_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Windows has."""
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(record_file, "_find_mincore", lambda: None)
    content = file.read_bytes()
    arena = Arena(4, RECORD)
    mover = DiskMover(arena, record_in(file, content))
    for key in (3, 0, 2, 1):
        assert read(mover, key, key) == (RECORD, None)
        assert arena.slot(key).numpy().tobytes() == content[key * RECORD : (key + 1) * RECORD]
    mover.close()


def test_a_store_is_read_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(RECORD)
    (tmp_path / "dense").write_bytes(content)
    place = Place(file=0, offset=4096, num_bytes=4096, checksum=zlib.crc32(content[4096:]))
    monkeypatch.delattr(os, "preadv")
    assert read_checked(tmp_path / "dense", place, "a tensor").numpy().tobytes() == content[4096:]


def test_records_of_many_parts_arrive_whole(tmp_path: Path) -> None:
    num_bytes = 2 * PART_BYTES + 4096
    content = torch.randint(0, 256, (3 * num_bytes,), dtype=torch.uint8).numpy().tobytes()
    path = tmp_path / "large.bin"
    path.write_bytes(content)
    arena = Arena(2, num_bytes)
    mover = DiskMover(arena, record_in(path, content, num_bytes))
    assert read(mover, 2, 1) == (num_bytes, None)
    assert arena.slot(1).numpy().tobytes() == content[2 * num_bytes :]
    mover.close()


def test_closing_does_not_wait_for_a_dead_disk(mover: DiskMover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CLOSE_LIMIT_S", 0.05)
    gate, begun = threading.Event(), threading.Event()
    stuck = TransferWorkers(2, "stuck")
    stuck.submit(0, [lambda: (begun.set(), gate.wait(30))[0]], is_prefetch=False)
    assert begun.wait(10)
    assert stuck.close() is False  # once the disk answered, it would be True
    gate.set()


def test_demands_overtake_the_parts_of_a_prefetch_and_only_a_quiet_one_can_be_cancelled() -> None:
    order: list[str] = []
    gate, begun = threading.Event(), threading.Event()
    pool = TransferWorkers(1, "test")
    pool.submit(0, [lambda: (begun.set(), gate.wait())[0], lambda: order.append("second part")], is_prefetch=True)
    assert begun.wait(10)
    assert not pool.cancel(0)
    pool.submit(1, [lambda: order.append("cancelled")], is_prefetch=True)
    pool.submit(2, [lambda: order.append("demand")], is_prefetch=False)
    assert pool.cancel(1)
    assert not pool.cancel(1)
    gate.set()
    deadline = time.monotonic() + 10
    while len(order) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    pool.close()
    assert order == ["demand", "second part"]
