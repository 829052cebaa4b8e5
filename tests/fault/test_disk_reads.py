"""Disks that fail: retried where it may pass, else an error that names the expert, the file and the offset."""

import ctypes
import errno
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from offload_moe.errors import TransferError
from offload_moe.memory import disk
from offload_moe.memory.arena import Arena
from offload_moe.memory.disk import PART_BYTES, PREFETCH_PART_BYTES, DiskMover
from offload_moe.memory.record_file import RecordFile, RecordFiles
from offload_moe.native import reads as native_reads
from offload_moe.store import Record
from offload_moe.store.manifest import Place
from offload_moe.store.reading import forget_cached, read_checked
from tests.support.disk import disk_mover, disk_that, failing, is_direct, pread, read

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
    mover = disk_mover(arena, record_in(file, file.read_bytes()))
    yield mover
    mover.close()


def test_an_input_output_error_that_passes_is_not_noticed(mover: DiskMover) -> None:
    with disk_that(mover.reads, failing(errno.EIO, 2)):
        assert read(mover, 1) == (RECORD, None)


def test_one_that_stays_names_expert_file_and_offset_and_the_next_read_works(mover: DiskMover, file: Path) -> None:
    with disk_that(mover.reads, failing(errno.EIO)):
        num_bytes, error = read(mover, 1)
    assert num_bytes == 0
    assert isinstance(error, TransferError)
    for part in ("expert 1 of layer 0", str(file), f"offset {RECORD}", "Input/output error"):
        assert part in str(error)
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == errno.EIO
    assert read(mover, 1) == (RECORD, None)


@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EBADF, errno.ENODEV])
def test_only_what_may_pass_is_read_again(mover: DiskMover, number: int) -> None:
    num_reads, fails = [0], failing(number)

    def read_at(*arguments: int) -> int:
        num_reads[0] += 1
        return fails(*arguments)

    with disk_that(mover.reads, read_at):
        read(mover, 1)
    assert num_reads[0] == (1 if number == errno.ENODEV else 3)


def test_short_reads_are_continued(mover: DiskMover, arena: Arena, file: Path) -> None:
    def read_at(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        return pread(descriptor, address, min(num_bytes, 4096), offset)

    with disk_that(mover.reads, read_at):
        assert read(mover, 2) == (RECORD, None)
    assert arena.slot(0).numpy().tobytes() == file.read_bytes()[2 * RECORD : 3 * RECORD]


def test_reads_that_are_interrupted_are_continued(mover: DiskMover) -> None:
    with disk_that(mover.reads, failing(errno.EINTR, 5)):
        assert read(mover, 2) == (RECORD, None)


@pytest.mark.parametrize("times", [1, 2])
def test_a_transfer_that_went_wrong_once_is_read_again(mover: DiskMover, arena: Arena, times: int) -> None:
    left = [times]

    def read_at(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        count = pread(descriptor, address, num_bytes, offset)
        left[0] -= 1
        if left[0] >= 0:
            ctypes.c_uint8.from_address(address).value ^= 1
        return count

    with disk_that(mover.reads, read_at):
        num_bytes, error = read(mover, 0)
    assert num_bytes == (RECORD if times == 1 else 0)
    assert error is None or "does not match its checksum" in str(error)
    assert (error is None) == (times == 1)


def test_the_checksum_of_an_expert_is_compared_once(mover: DiskMover, file: Path) -> None:
    """Files do not change."""
    assert read(mover, 1) == (RECORD, None)
    with file.open("r+b") as opened:
        opened.seek(RECORD)
        opened.write(b"changed")
    assert read(mover, 1) == (RECORD, None)
    mover.reads.check_again()
    assert isinstance(read(mover, 1)[1], TransferError)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.EOPNOTSUPP])
def test_every_checksum_is_compared_once_a_read_went_wrong(mover: DiskMover, file: Path, number: int) -> None:
    """A refusal of direct reads is no failure of the disk."""
    assert read(mover, 1) == (RECORD, None)
    with disk_that(mover.reads, failing(number, 1)):
        read(mover, 2)
    with file.open("r+b") as opened:
        opened.seek(RECORD)
        opened.write(b"changed")
    _, error = read(mover, 1)
    assert (error is not None) == (number == errno.EIO)


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


@pytest.fixture
def uncached(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    with closing(RecordFile(file)) as opened:
        if not opened.is_direct:
            pytest.skip("the file system of the temporary folder has no direct reads")


def test_a_file_counts_as_open_once_native_threads_have_it(file: Path) -> None:
    """Another thread that places a record in it meanwhile would let them read a file that they do not have."""
    files, used = RecordFiles(), []
    for _ in range(2):
        files.open(file, lambda number, _: used.append((number, files.number(file))))
    assert used == [(0, None)]
    assert files.number(file) == 0
    assert files.refuse_direct(file, "as a test wants", lambda number, native: used.append((number, native.direct)))
    assert used[1:] == [(0, -1)]
    assert not files.refuse_direct(file.parent / "another", "as a test wants", lambda *_: None)
    files.close()


@pytest.mark.usefixtures("uncached")
def test_direct_reads_that_are_refused_become_buffered_and_it_is_said_once(
    file: Path, arena: Arena, caplog: pytest.LogCaptureFixture
) -> None:
    content = file.read_bytes()
    mover = disk_mover(arena, record_in(file, content))
    refused: list[int] = []

    def read_at(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        if is_direct(descriptor):
            refused.append(offset)
            return -errno.EINVAL
        return pread(descriptor, address, num_bytes, offset)

    forget_cached(file)
    with disk_that(mover.reads, read_at):
        for key in (1, 2, 3):
            assert read(mover, key) == (RECORD, None)
            assert arena.slot(0).numpy().tobytes() == content[key * RECORD : (key + 1) * RECORD]
    assert len(refused) == 1
    assert [r.message for r in caplog.records if "page cache" in r.message] == [caplog.records[0].message]
    mover.close()


@pytest.mark.usefixtures("uncached")
def test_what_is_cached_is_copied_and_what_is_not_is_read_around_the_cache(mover: DiskMover, file: Path) -> None:
    used: list[bool] = []

    def read_at(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        used.append(is_direct(descriptor))
        return pread(descriptor, address, num_bytes, offset)

    with disk_that(mover.reads, read_at):
        file.read_bytes()  # now it is cached
        read(mover, 0)
        forget_cached(file)
        read(mover, 0)
    assert used == [False, True]


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
    mover = disk_mover(arena, record_in(path, content, num_bytes))
    assert read(mover, 2, 1) == (num_bytes, None)
    assert arena.slot(1).numpy().tobytes() == content[2 * num_bytes :]
    mover.close()


def test_closing_does_not_wait_for_a_dead_disk(mover: DiskMover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_reads, "_CLOSE_LIMIT_S", 0.05)
    gate, begun = threading.Event(), threading.Event()

    def read_at(*arguments: int) -> int:
        begun.set()
        gate.wait(30)
        return pread(*arguments)

    mover.reads.read_with(read_at)
    mover.start(0, 0, lambda *_: None)
    assert begun.wait(10)
    assert not mover.reads.close()  # once the disk answered, it would be true
    mover.close()
    gate.set()


def test_threads_of_a_dead_disk_are_not_waited_for_at_exit(file: Path) -> None:
    """Neither by the interpreter: a daemon thread that was stopped inside of torch would abort the process."""
    code = f"""
import threading, zlib
from pathlib import Path
from offload_moe.memory.arena import Arena
from offload_moe.native import reads as native_reads
from offload_moe.store import Record
from tests.support.disk import disk_mover
native_reads._CLOSE_LIMIT_S = 0.1
record = Record(name="expert", path=Path({str(file)!r}), offset=0, num_bytes={RECORD}, checksum=0)
mover, begun, gate = disk_mover(Arena(1, {RECORD}), lambda key: record), threading.Event(), threading.Event()
mover.reads.read_with(lambda *_: (begun.set(), gate.wait(60))[1])
mover.start(0, 0, lambda *_: None)
assert begun.wait(10)
print("stuck")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr.strip()) == (0, "stuck", "")


class OneReader:
    """A disk with one reader, which shows what it reads, and waits for a word before each part."""

    def __init__(self, tmp_path: Path, num_parts: int) -> None:
        num_bytes = num_parts * PREFETCH_PART_BYTES
        path = tmp_path / "parts.bin"
        content = bytes(4 * num_bytes)
        path.write_bytes(content)
        self.mover = disk_mover(Arena(4, num_bytes), record_in(path, content, num_bytes), num_readers=1)
        self.mover.transfers.open_all(range(4))
        self.read: list[tuple[int, int]] = []  # record and part
        self._num_bytes = num_bytes
        self._words, self._begun = threading.Semaphore(0), threading.Semaphore(0)
        self.mover.reads.read_with(self._read_at)

    def _read_at(self, descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        record, start = divmod(offset, self._num_bytes)
        self.read.append((record, start // PREFETCH_PART_BYTES))
        self._begun.release()
        self._words.acquire()
        return num_bytes

    def until_it_reads(self) -> None:
        assert self._begun.acquire(timeout=10)

    def go_on(self, num_parts: int) -> None:
        self._words.release(num_parts)


def test_demands_overtake_the_parts_of_a_prefetch_and_only_a_quiet_one_can_be_cancelled(tmp_path: Path) -> None:
    disk = OneReader(tmp_path, num_parts=2)
    mover, arrived = disk.mover, threading.Semaphore(0)
    for key in (0, 1, 2):
        mover.start(key, key, lambda *_: arrived.release(), is_prefetch=True)
    disk.until_it_reads()
    assert not mover.cancel(0)  # it is being read
    assert mover.cancel(1)
    assert not mover.cancel(1)
    mover.start(3, 3, lambda *_: arrived.release())
    mover.promote(2)
    assert not mover.cancel(2)  # it is demanded
    disk.go_on(100)
    for _ in range(3):
        assert arrived.acquire(timeout=10)
    assert disk.read == [(0, 0), (3, 0), (2, 0), (0, 1)]  # demands in parts of twice the size
    mover.close()


def test_prefetches_leave_a_thread_to_demands(file: Path) -> None:
    mover = disk_mover(Arena(4, RECORD), record_in(file, file.read_bytes()), num_readers=2)
    gate, demanded = threading.Event(), threading.Event()

    def read_at(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        if offset < 3 * RECORD:
            gate.wait(30)
        return num_bytes

    mover.reads.trust()
    with disk_that(mover.reads, read_at):
        for key in range(3):
            mover.start(key, key, lambda *_: None, is_prefetch=True)
        mover.start(3, 3, lambda *_: demanded.set())
        assert demanded.wait(10)
        gate.set()
    mover.close()
