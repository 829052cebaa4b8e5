"""Checked reads: bytes that do not match their checksum are never returned."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from offload_moe.errors import StoreCorrupt, StoreError
from offload_moe.native.files import read_at
from offload_moe.native.kernels import crc32
from offload_moe.store.manifest import Place
from offload_moe.system.open_files import opened

CHUNK_BYTES = 1 << 24
TOUCH_BYTES = 1 << 22


def read_checked(path: Path, place: Place, what: str) -> Tensor:
    """The bytes, uint8 ``[num_bytes]``. Raises: StoreCorrupt, StoreError naming the file and `what`."""
    data = torch.empty(place.num_bytes, dtype=torch.uint8)
    _read(path, place, what, data.numpy().data)
    return data


def check(path: Path, place: Place, what: str) -> None:
    """Read and compare, without returning the bytes. Raises: as `read_checked`."""
    _read(path, place, what, None)


def forget_cached(path: Path) -> None:
    """Drop a file from the page cache, so that the next read is from the disk; a hint, if the system has one."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def touch(places: Iterable[tuple[Path, Place]]) -> None:
    """Read a file into the page cache. Errors are left to the actual read."""
    scratch = memoryview(bytearray(TOUCH_BYTES))
    for path, place in places:
        with suppress(OSError), opened(path) as descriptor:
            for start in range(0, place.num_bytes, TOUCH_BYTES):
                read_at(descriptor, scratch[: place.num_bytes - start], place.offset + start)


def checksum_of(descriptor: int, offset: int, num_bytes: int, target: memoryview | None = None) -> int | None:
    """CRC-32 of a part of an open file, which is kept in the target if there is one. None: the file ends inside.

    Raises: OSError.
    """
    scratch = memoryview(bytearray(min(CHUNK_BYTES, num_bytes))) if target is None else target
    done = checksum = 0
    while done < num_bytes:
        wanted = min(CHUNK_BYTES, num_bytes - done)
        view = scratch[:wanted] if target is None else target[done : done + wanted]
        count = read_at(descriptor, view, offset + done)
        if count == 0:
            return None
        checksum = crc32(view[:count], checksum)
        done += count
    return checksum


def _read(path: Path, place: Place, what: str, target: memoryview | None) -> None:
    try:
        with opened(path) as descriptor:
            checksum = checksum_of(descriptor, place.offset, place.num_bytes, target)
    except OSError as error:
        raise StoreError(f"{path}: reading {what} failed: {error.strerror}.") from error
    if checksum is None:
        raise StoreCorrupt(f"{path} ends inside {what}. Quantize the model again.")
    if checksum != place.checksum:
        raise StoreCorrupt(f"{path}: {what} does not match its checksum. Quantize the model again.")
