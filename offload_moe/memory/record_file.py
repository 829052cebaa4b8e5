"""One open file of records, read around the page cache where that is possible and pays.

Platforms differ: Linux has O_DIRECT and `preadv`, macOS `preadv`, Windows neither. What is missing is done without.
"""

import ctypes
import errno
import logging
import mmap
import os
import sys
from pathlib import Path

import numpy as np

from offload_moe.native.kernels import FileStruct
from offload_moe.quant.layout import RECORD_ALIGNMENT, round_up
from offload_moe.store.positioned import open_for_reading, read_at
from offload_moe.system.lifecycle import finalize
from offload_moe.system.open_files import open_descriptor

logger = logging.getLogger(__name__)


class RecordFile:
    """Raises: OSError from every call; `TransferError` is made of it by those who know the expert."""

    def __init__(self, path: Path, *, allow_direct: bool = True, uses_cached: bool = True) -> None:
        """uses_cached: what is in the page cache already is copied from there."""
        self._path = path
        self._cached = open_for_reading(path)
        descriptors = [self._cached]
        self._close = finalize(self, _close_all, descriptors)  # also where it is dropped
        self._direct = _open_direct(path) if allow_direct else None
        if self._direct is not None:
            descriptors.append(self._direct)
        self._pages = _CachedPages(self._cached) if self._direct is not None and uses_cached else None
        if allow_direct and self._direct is None:
            self._say_buffered("the file system does not offer direct reads")
        status = os.fstat(self._cached)
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @property
    def is_direct(self) -> bool:
        """Whether what is not in the page cache is read around it."""
        return self._direct is not None

    def is_current(self) -> bool:
        """Whether the path still leads to the file that is open."""
        try:
            status = os.stat(self._path)
        except OSError:
            return False
        return self.identity == (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the buffer and return its length, or less at the end of the file."""
        if self._direct is not None and not (self._pages is not None and self._pages.hold(offset, len(buffer))):
            try:
                return self._fill(self._direct, buffer, offset)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._direct = None  # some file systems accept the flag and refuse the read
                self._say_buffered(f"direct reads are refused ({error.strerror})")
        return self._fill(self._cached, buffer, offset)

    def native(self) -> FileStruct:
        """For reads by native threads; valid until `close`."""
        pages = self._pages.address if self._pages is not None else 0
        direct = -1 if self._direct is None else self._direct
        return FileStruct(direct=direct, cached=self._cached, pages=pages, num_bytes=self.identity[2])

    def close(self) -> None:
        self._close()

    def _fill(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        done = 0
        while done < len(buffer):
            count = read_at(descriptor, buffer[done:], offset + done)
            done += count
            if count == 0 or (descriptor == self._direct and count % RECORD_ALIGNMENT):
                break  # the end of the file
        return done

    def _say_buffered(self, why: str) -> None:
        logger.warning("%s: %s; experts are read through the page cache.", self._path, why)


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _open_direct(path: Path) -> int | None:
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        return None
    try:
        return open_descriptor(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None


class _CachedPages:
    """Which pages of a file lie in the page cache: reading those is a copy, reading around them is not.

    Linux tells only those who may write to the file; everybody else reads directly.
    """

    def __init__(self, descriptor: int) -> None:
        self._mincore = _find_mincore()
        self._base: np.ndarray | None = None
        if self._mincore is None or not os.access(f"/proc/self/fd/{descriptor}", os.W_OK):
            return
        size = os.fstat(descriptor).st_size
        if size:
            # Address space only: no page is ever touched through it. The array keeps the mapping alive.
            self._base = np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), dtype=np.uint8)
            self._address = self._base.ctypes.data

    @property
    def address(self) -> int:
        """Where the file is mapped; 0 where nobody may know what is cached."""
        return 0 if self._base is None else self._address

    def hold(self, offset: int, num_bytes: int) -> bool:
        """Whether all of the range is cached."""
        if self._base is None or self._mincore is None:
            return False
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(offset + num_bytes, len(self._base))
        if end <= start:
            return False
        last = (end - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        # The end first: asking for every page of a record takes as long as reading a tenth of it.
        return self._are_present(last, end) and self._are_present(start, end)

    def _are_present(self, start: int, end: int) -> bool:
        assert self._mincore is not None
        present = np.zeros(round_up(end - start, mmap.PAGESIZE) // mmap.PAGESIZE, dtype=np.uint8)
        is_known = self._mincore(self._address + start, end - start, present.ctypes.data) == 0
        return is_known and bool((present & 1).all())


def _find_mincore() -> "ctypes._NamedFuncPointer | None":
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).mincore
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p], ctypes.c_int
    return function
