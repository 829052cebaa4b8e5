"""Reading one record and waiting for it, and disks that fail."""

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from offload_moe.memory.arena import Arena
from offload_moe.memory.disk import DiskMover
from offload_moe.native.kernels import Reads, SlotTable
from offload_moe.native.reads import ReadAt
from offload_moe.store import Record

NUM_KEYS = 16


def disk_mover(arena: Arena, record_of: Callable[[int], Record], num_readers: int | None = None) -> DiskMover:
    """Of records with keys below `NUM_KEYS`."""
    return DiskMover(arena, SlotTable(NUM_KEYS, arena.num_slots, arena.addresses), record_of, num_readers=num_readers)


def read(mover: DiskMover, key: int, slot: int = 0) -> tuple[int, BaseException | None]:
    """What the mover says of it: bytes, and an error."""
    done = threading.Event()
    result: list[tuple[int, BaseException | None]] = []

    def arrived(slot: int, num_bytes: int, error: BaseException | None) -> None:
        result.append((num_bytes, error))
        done.set()

    mover.start(key, slot, arrived)
    assert done.wait(10)
    assert len(result) == 1
    return result[0]


def pread(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
    """What a reader does without a script."""
    try:
        return os.preadv(descriptor, [(ctypes.c_uint8 * num_bytes).from_address(address)], offset)
    except OSError as error:
        return -(error.errno or errno.EIO)


def failing(number: int, times: int = 1 << 30) -> ReadAt:
    """A disk that fails the first times."""
    left = [times]

    def read_at(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        left[0] -= 1
        return -number if left[0] >= 0 else pread(descriptor, address, num_bytes, offset)

    return read_at


def is_direct(descriptor: int) -> bool:
    """Whether what is read through it passes the page cache by."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@contextmanager
def disk_that(reads: Reads, read_at: ReadAt) -> Iterator[None]:
    """Reads are done by this function inside."""
    reads.read_with(read_at)
    try:
        yield
    finally:
        reads.read_with(None)
