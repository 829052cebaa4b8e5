"""The disk tier: whole-record reads straight into the RAM arena, several in flight."""

import errno
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from offload_moe.errors import TransferError
from offload_moe.memory.arena import Arena
from offload_moe.memory.mover import Arrived
from offload_moe.memory.record_file import RecordFile
from offload_moe.memory.workers import TransferWorkers
from offload_moe.native.kernels import PlaceStruct, Reads, ReadSizes, SlotTable, crc32
from offload_moe.store import Record

# Bytes in flight: enough for a fast disk, and no more, so that records arrive one after the other and one computes
# while the next is read. Every read wakes a thread, which takes a core from the compute for a moment.
FLIGHT_BYTES = 8 << 20
PART_BYTES = 4 << 20
PREFETCH_PART_BYTES = 2 << 20  # what a demand may have to wait for, and what a wrong guess may cost
LEAST_READERS, MOST_READERS = 2, 8
RETRY_PAUSES_S = (0.01, 0.2)  # before each further attempt
PASSING = frozenset({errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EBADF})


def readers_for(record_bytes: int) -> int:
    """Threads that read records of this size, one part each."""
    return max(LEAST_READERS, min(MOST_READERS, FLIGHT_BYTES // min(record_bytes, PART_BYTES)))


class DiskMover:
    """Fills arena slots from disk on threads; the read itself holds no lock of the interpreter."""

    def __init__(self, arena: Arena, record_of: Callable[[int], Record], num_readers: int | None = None) -> None:
        """record_of: key -> where the record lies, and its checksum. num_readers: None asks `readers_for`."""
        self._arena = arena
        self._record_of = record_of
        self._checked: set[int] = set()
        self._files = _OpenFiles()
        self._workers = TransferWorkers(num_readers or readers_for(arena.slot_bytes), "expert-read")

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        record = self._record_of(key)
        part_bytes = PREFETCH_PART_BYTES if is_prefetch else PART_BYTES
        starts = range(0, record.num_bytes, part_bytes)
        reading = _Reading(key, slot, record, self._arena, self._files, self._checked, arrived, len(starts))
        parts = [partial(reading.read_part, start, part_bytes) for start in starts]  # which do not keep the mover alive
        self._workers.submit(slot, parts, is_prefetch=is_prefetch)

    def promote(self, slot: int) -> None:
        self._workers.promote(slot)

    def cancel(self, slot: int) -> bool:
        return self._workers.cancel(slot)

    def used(self, slots: Sequence[int]) -> None:
        """Compute on the CPU is finished when it returns: nothing to wait for."""

    def native_reads(self, slot_table: SlotTable, num_keys: int) -> Reads:
        """Reads of the same records into the same arena that native runs begin by themselves."""
        records = [self._record_of(key) for key in range(num_keys)]
        paths = list(dict.fromkeys(record.path for record in records))
        places = [
            PlaceStruct(
                file=paths.index(record.path),
                offset=record.offset,
                num_bytes=record.num_bytes,
                checksum=record.checksum,
            )
            for record in records
        ]
        try:
            files = [self._files.get(path).native() for path in paths]
        except OSError as error:
            raise TransferError(f"{error.filename} cannot be read: {error.strerror}.") from error
        sizes = ReadSizes(
            num_threads=readers_for(self._arena.slot_bytes),
            part_bytes=PART_BYTES,
            prefetch_part_bytes=PREFETCH_PART_BYTES,
        )
        return Reads(slot_table, files, places, sizes, owner=(self._arena, self._files))

    def close(self) -> None:
        if self._workers.close():  # a thread that is still reading needs its file
            self._files.close()


@dataclass(slots=True)
class _Reading:
    """One record on its way, in parts. checked: keys whose checksum was compared."""

    key: int
    slot: int
    record: Record
    arena: Arena
    files: "_OpenFiles"
    checked: set[int]
    arrived: Arrived
    num_left: int
    error: Exception | None = None
    view: memoryview | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read_part(self, start: int, part_bytes: int) -> None:
        error = None
        try:
            if self.view is None:
                self.view = self.arena.slot(self.slot).numpy().data[: self.record.num_bytes]
            self._read_patiently(self.view[start : start + part_bytes], start)
        except Exception as raised:
            error = raised
        if not self._is_last(error):
            return
        try:
            if self.error is not None:
                raise self.error
            self._check_once()
        except Exception as raised:
            self.arrived(self.slot, 0, raised)
        else:
            self.arrived(self.slot, self.record.num_bytes, None)

    def _is_last(self, error: Exception | None) -> bool:
        """Note that a part has ended; whether it was the last one."""
        with self.lock:
            self.error = self.error or error
            self.num_left -= 1
            return self.num_left == 0

    def _read_patiently(self, view: memoryview, start: int) -> None:
        """Read, and read again what may pass. Raises: TransferError naming the expert, the file and the offset."""
        record, offset = self.record, self.record.offset + start
        failure: OSError | None
        for pause in (*RETRY_PAUSES_S, None):
            try:
                count = self.files.get(record.path).read_into(view, offset)
            except OSError as error:
                failure, why = error, error.strerror or str(error)
                may_pass = error.errno in PASSING
            else:
                if count == len(view):
                    return
                failure, why, may_pass = None, f"short read, {count} of {len(view)} bytes", True
            if pause is None or not may_pass:
                raise _failed(record, offset, why) from failure
            time.sleep(pause)
            self.files.renew(record.path)

    def _check_once(self) -> None:
        """Compare the first read of every expert with its checksum; the file does not change afterwards.

        One that differs is read once more: a transfer can go wrong where the disk is right.
        """
        if self.key in self.checked:
            return
        record, view = self.record, self.view
        assert view is not None
        if crc32(view) != record.checksum:
            self._read_patiently(view, 0)
            if crc32(view) != record.checksum:
                raise TransferError(
                    f"{record.name}, {record.path} at offset {record.offset} ({record.num_bytes} bytes): it does not "
                    "match its checksum. Check the disk; `offload-moe verify` finds what is damaged."
                )
        self.checked.add(self.key)


class _OpenFiles:
    """Files opened when first read, and anew when another file has taken their place."""

    def __init__(self) -> None:
        self._files: dict[Path, RecordFile] = {}
        self._replaced: list[RecordFile] = []  # threads may still be reading them
        self._lock = threading.Lock()

    def get(self, path: Path) -> RecordFile:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = RecordFile(path)
            return file

    def renew(self, path: Path) -> None:
        """Open the path anew next time, where it leads to another file by now."""
        with self._lock:
            file = self._files.get(path)
            if file is not None and not file.is_current():
                self._replaced.append(self._files.pop(path))

    def close(self) -> None:
        for file in (*self._files.values(), *self._replaced):
            file.close()
        self._files.clear()
        self._replaced.clear()


def _failed(record: Record, offset: int, why: str) -> TransferError:
    return TransferError(
        f"Reading {record.name} from {record.path} at offset {offset} failed: {why}. Check that the store is still "
        "there and its disk is well, then ask again; `offload-moe verify` checks the store."
    )
