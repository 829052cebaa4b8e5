"""The open files of a store's records for native threads, which bypass the page cache where that pays."""

import logging
import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from offload_moe.native.files import system_file
from offload_moe.native.kernels import FileStruct
from offload_moe.system import windows
from offload_moe.system.lifecycle import finalize
from offload_moe.system.open_files import open_descriptor

UseFile = Callable[[int, FileStruct], None]  # lets native threads read a file under its number

logger = logging.getLogger(__name__)


class RecordFile:
    """A file of records, open for native threads. Every call may raise OSError, which the caller translates."""

    def __init__(self, path: Path, *, allow_direct: bool = True, uses_cached: bool = True) -> None:
        """uses_cached: whether pages that are in the page cache are copied from there."""
        self._path = path
        self._cached = open_descriptor(path)
        descriptors = [self._cached]
        self._close = finalize(self, _close_all, descriptors)  # also when it is dropped
        self._direct = _open_direct(path) if allow_direct else None
        if self._direct is not None:
            descriptors.append(self._direct)
        self._pages = _map_pages(self._cached) if self._direct is not None and uses_cached else None
        if allow_direct and self._direct is None:
            self._warn_of_buffering("the file system does not offer direct reads")
        status = os.fstat(self._cached)
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @property
    def is_direct(self) -> bool:
        """Whether pages that are not in the page cache are read around it."""
        return self._direct is not None

    def is_current(self) -> bool:
        """Whether the path still leads to the file that is open."""
        try:
            status = os.stat(self._path)
        except OSError:
            return False
        return self.identity == (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def refuse_direct(self, why: str) -> None:
        """Read through the page cache from now on."""
        if self._direct is not None:
            self._direct = None
            self._warn_of_buffering(f"direct reads are refused ({why})")

    def native(self) -> FileStruct:
        """The file for native threads; valid until `close`."""
        pages = 0 if self._pages is None else self._pages.ctypes.data
        direct = -1 if self._direct is None else system_file(self._direct)
        return FileStruct(direct=direct, cached=system_file(self._cached), pages=pages, num_bytes=self.identity[2])

    def close(self) -> None:
        self._close()

    def _warn_of_buffering(self, why: str) -> None:
        logger.warning("%s: %s; experts are read through the page cache.", self._path, why)


class RecordFiles:
    """Files by path, numbered as they are opened. Safe to use from several threads."""

    def __init__(self) -> None:
        self._files: dict[Path, RecordFile] = {}
        self._numbers: dict[Path, int] = {}
        self._replaced: list[RecordFile] = []  # threads may still be reading them
        self._opening = threading.Lock()  # may be held for long
        self._lock = threading.Lock()  # of the files; taken inside `_opening`

    def number(self, path: Path) -> int | None:
        """The number of an open file, which native threads have; None where it is not open."""
        return self._numbers.get(path) if path in self._files else None

    def open(self, path: Path, use: UseFile) -> None:
        """Open a file that is not open, or whose place another has taken. It counts as open once it is in use.

        Raises: OSError, MemoryError.
        """
        with self._opening:
            file = self._files.get(path)
            if file is not None:
                if file.is_current():
                    return
                with self._lock:
                    self._replaced.append(self._files.pop(path))
            opened = RecordFile(path)
            with self._lock:
                use(self._numbers.setdefault(path, len(self._numbers)), opened.native())
                self._files[path] = opened

    def refuse_direct(self, path: Path, why: str, use: UseFile) -> bool:
        """Read this file through the page cache from now on. Returns whether it is open."""
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                file.refuse_direct(why)
                use(self._numbers[path], file.native())
            return file is not None

    def close(self) -> None:
        for file in (*self._files.values(), *self._replaced):
            file.close()
        self._files.clear()
        self._replaced.clear()


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _open_direct(path: Path) -> int | None:
    if not (hasattr(os, "O_DIRECT") or windows.IS_WINDOWS):
        return None
    try:
        return open_descriptor(path, is_direct=True)
    except OSError:
        return None


def _map_pages(descriptor: int) -> np.ndarray | None:
    """Map the file, to look up which of its pages are cached: those are copied, the others are read directly.

    Linux reports this only for files that may be written. The mapping uses address space only: no page is touched
    through it. The array keeps the mapping alive.
    """
    size = os.fstat(descriptor).st_size
    if sys.platform != "linux" or not size or not os.access(f"/proc/self/fd/{descriptor}", os.W_OK):
        return None
    return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), dtype=np.uint8)
