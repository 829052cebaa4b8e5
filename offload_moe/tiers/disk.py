"""The disk tier: whole-record reads straight into the RAM arena, several in flight."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from offload_moe.errors import TransferError
from offload_moe.quant.layout import RECORD_ALIGNMENT
from offload_moe.tiers.arena import Arena
from offload_moe.tiers.mover import Arrived

NUM_READERS = 4  # reads in flight; an NVMe disk wants a few, a slow disk is not hurt by them


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordAddress:
    """Where one expert's record lies. `offset` and `num_bytes` are multiples of 4096."""

    path: Path
    offset: int
    num_bytes: int


class RecordFile:
    """One open file of records, read around the page cache where the file system allows it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_direct = False
        try:
            if hasattr(os, "O_DIRECT"):
                try:
                    self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
                    self.is_direct = True
                except OSError:
                    self._fd = os.open(path, os.O_RDONLY)
            else:
                self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise TransferError(
                f"Cannot open {path}: {error.strerror}. Check that the store is still there."
            ) from error

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer. Raises: TransferError on a read error or at the end of the file."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise self._failed(offset + done, error.strerror) from error
            if count == 0 or (self.is_direct and count % RECORD_ALIGNMENT and done + count < len(buffer)):
                raise self._failed(offset + done, f"short read, {done + count} of {len(buffer)} bytes")
            done += count

    def close(self) -> None:
        os.close(self._fd)

    def _failed(self, offset: int, why: str | None) -> TransferError:
        return TransferError(
            f"Reading {self.path} at offset {offset} failed: {why}. "
            "Check the disk; `offload-moe verify` checks the store."
        )


class DiskMover:
    """Fills arena slots from disk on threads; the read itself holds no lock of the interpreter."""

    def __init__(
        self, arena: Arena, address_of: Callable[[int], RecordAddress], num_readers: int = NUM_READERS
    ) -> None:
        """address_of: key -> where the record lies."""
        self._arena = arena
        self._address_of = address_of
        self._files: dict[Path, RecordFile] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(num_readers, thread_name_prefix="expert-read")

    def start(self, key: int, slot: int, arrived: Arrived) -> None:
        self._pool.submit(self._read, key, slot, arrived)

    def used(self, slot: int) -> None:
        """Compute on the CPU is finished when it returns: nothing to wait for."""

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _read(self, key: int, slot: int, arrived: Arrived) -> None:
        try:
            address = self._address_of(key)
            view = self._arena.slot(slot).numpy().data[: address.num_bytes]
            self._file(address.path).read_into(view, address.offset)
        except BaseException as error:
            arrived(slot, 0, error)
        else:
            arrived(slot, address.num_bytes, None)

    def _file(self, path: Path) -> RecordFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = RecordFile(path)
            return self._files[path]
