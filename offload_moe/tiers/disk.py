"""The disk tier: whole-record reads straight into the RAM arena, several in flight."""

import os
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from offload_moe.errors import TransferError
from offload_moe.quant.layout import RECORD_ALIGNMENT
from offload_moe.store import Record
from offload_moe.tiers.arena import Arena
from offload_moe.tiers.mover import Arrived
from offload_moe.tiers.workers import TransferWorkers

NUM_READERS = 4  # reads in flight; an NVMe disk wants a few, a slow disk is not hurt by them


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

    def __init__(self, arena: Arena, record_of: Callable[[int], Record], num_readers: int = NUM_READERS) -> None:
        """record_of: key -> where the record lies, and its checksum."""
        self._arena = arena
        self._record_of = record_of
        self._checked: set[int] = set()
        self._files: dict[Path, RecordFile] = {}
        self._lock = threading.Lock()
        self._workers = TransferWorkers(num_readers, "expert-read")

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        self._workers.submit(slot, partial(self._read, key, slot, arrived), is_prefetch=is_prefetch)

    def hurry(self, slot: int) -> None:
        self._workers.hurry(slot)

    def used(self, slots: Sequence[int]) -> None:
        """Compute on the CPU is finished when it returns: nothing to wait for."""

    def close(self) -> None:
        self._workers.close()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _read(self, key: int, slot: int, arrived: Arrived) -> None:
        try:
            record = self._record_of(key)
            view = self._arena.slot(slot).numpy().data[: record.num_bytes]
            self._file(record.path).read_into(view, record.offset)
            self._check_once(key, view, record)
        except BaseException as error:
            arrived(slot, 0, error)
        else:
            arrived(slot, record.num_bytes, None)

    def _check_once(self, key: int, view: memoryview, record: Record) -> None:
        """Compare the first read of every expert with its checksum; the file does not change afterwards."""
        if key in self._checked:
            return
        if zlib.crc32(view) != record.checksum:
            raise TransferError(
                f"{record.path}: the expert at offset {record.offset} ({record.num_bytes} bytes) does not match its "
                "checksum. Check the disk, then quantize the model again."
            )
        self._checked.add(key)

    def _file(self, path: Path) -> RecordFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = RecordFile(path)
            return self._files[path]
