"""The disk tier: whole-record reads straight into the RAM arena, several in flight."""

import ctypes
import errno
import heapq
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count

from offload_moe.errors import TransferError
from offload_moe.memory.arena import Arena
from offload_moe.memory.arrivals import ArrivalCondition
from offload_moe.memory.mover import Arrived
from offload_moe.memory.record_file import RecordFiles
from offload_moe.memory.transfers import PassReads, Reading, Transfers
from offload_moe.native.kernels import (
    SHORT_READ,
    WRONG_CHECKSUM,
    Completion,
    PieceStruct,
    PlaceStruct,
    Reads,
    ReadSizes,
    Repacking,
    SlotTable,
)
from offload_moe.store import Record
from offload_moe.system.lifecycle import finalize

# Bytes in flight: enough for a fast disk, and no more, so that records arrive one after the other and one is computed
# with while the next is read. Every read wakes a thread, which takes a core from the compute for a moment.
FLIGHT_BYTES = 8 << 20
PART_BYTES = 4 << 20
PREFETCH_PART_BYTES = 2 << 20  # what a demand may have to wait for, and what a wrong guess may cost
LEAST_READERS, MOST_READERS = 2, 8
RETRY_PAUSES_S = (0.01, 0.2)  # before each further attempt
PASSING = frozenset({SHORT_READ, errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EBADF})
REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP})  # direct reads: some file systems accept the flag only
ATTEND_S = 3600.0  # between two wakings where there is nothing to do
JOIN_S = 5.0

RecordOf = Callable[[int], Record]
RepackingOf = Callable[[int], Repacking | None]  # of a record on its arrival in RAM; None: it is kept as on the disk


def readers_for(record_bytes: int) -> int:
    """Threads that read records of this size, one part each."""
    return max(LEAST_READERS, min(MOST_READERS, FLIGHT_BYTES // min(record_bytes, PART_BYTES)))


class DiskMover:
    """Fills arena slots from disk, by native threads, which end when the mover is closed or dropped."""

    def __init__(
        self,
        arena: Arena,
        slot_table: SlotTable,
        record_of: RecordOf,
        repacking_of: RepackingOf = lambda _: None,
        num_readers: int | None = None,
    ) -> None:
        """record_of: key -> where the record lies, and its checksum. num_readers: None takes `readers_for`."""
        repackings = [repacking_of(key) for key in range(slot_table.num_keys)]
        sizes = ReadSizes(
            num_threads=num_readers or readers_for(arena.slot_bytes),
            part_bytes=PART_BYTES,
            prefetch_part_bytes=PREFETCH_PART_BYTES,
            scratch_bytes=max((found.order.scratch_bytes for found in repackings if found is not None), default=0),
        )
        files, pieces = RecordFiles(), dict[int, "ctypes.Array[PieceStruct]"]()
        self.reads = Reads(slot_table, sizes, owner=(arena, files, repackings, pieces))
        self.transfers = transfers = DiskTransfers(self.reads, files, record_of, repackings, pieces)
        self.changed = transfers.changed  # the condition of the tier
        thread = threading.Thread(target=transfers.attend, name="expert-reads", daemon=True)
        self._close = finalize(self, _close, self.reads, files, thread)  # also at exit, before daemon threads stop
        thread.start()

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        self.transfers.start(key, slot, arrived, is_prefetch=is_prefetch)

    def promote(self, slot: int) -> None:
        self.transfers.promote(slot)

    def cancel(self, slot: int) -> bool:
        return self.transfers.cancel(slot)

    def used(self, slots: Sequence[int]) -> None:
        self.transfers.used(slots)

    def drain(self) -> None:
        self.transfers.drain()

    def read_passes(self, pass_reads: PassReads) -> Reads:
        """The reader with which token passes fetch experts; `pass_reads` accounts for its reads. Raises: OSError."""
        self.transfers.open_all(range(self.reads.num_keys))
        self.transfers.account_to(pass_reads)
        return self.reads

    def close(self) -> None:
        self._close()


class DiskTransfers(Transfers):
    """Reads of a store: its files, and retries after errors that may pass. Does not keep the mover alive."""

    def __init__(
        self,
        reads: Reads,
        files: RecordFiles,
        record_of: RecordOf,
        repackings: Sequence[Repacking | None],
        pieces: dict[int, "ctypes.Array[PieceStruct]"],
    ) -> None:
        super().__init__(reads, ArrivalCondition(reads, weakref.WeakMethod(self.drain)))
        self._reads = reads
        self._files = files
        self._record_of = record_of
        self._repackings = repackings
        self._pieces = pieces  # by key, which native threads read
        self._waiting: list[tuple[float, int, Reading]] = []  # reads to submit, by the time when they are due
        self._order = count()

    def submit(self, reading: Reading) -> None:
        if self._place(reading.key):
            super().submit(reading)
        else:
            self._submit_after(0.0, reading)  # a file is opened without the lock

    def has_failed(self, reading: Reading, completion: Completion) -> None:
        """Submit the read again, after a pause, if its error may pass; else give it up."""
        record = self._record_of(reading.key)
        path, _ = record.place_at(completion.start)
        is_refused = completion.was_direct and completion.error in REFUSED
        if is_refused and self._files.refuse_direct(path, os.strerror(completion.error), self._reads.use_file):
            super().submit(reading)
        elif completion.error == WRONG_CHECKSUM:
            self.give_up(reading, _damaged(record))
        elif completion.error in PASSING and reading.num_failures < len(RETRY_PAUSES_S):
            reading.num_failures += 1
            self._submit_after(RETRY_PAUSES_S[reading.num_failures - 1], reading)
        else:
            self.give_up(reading, _failed(record, completion))

    def open_all(self, keys: range) -> None:
        """Open the files of all records. Raises: OSError."""
        for key in keys:
            if not self._place(key):
                self._open(key)

    def attend(self) -> None:
        """Drain while no other thread does, and submit reads that are due; the body of a thread."""
        pause_s = 0.0
        while self._reads.attend(pause_s):
            with self.changed:
                self.drain()
                due = self._take_due()
            for reading in due:
                self._submit_again(reading)
            with self.changed:
                pause_s = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else ATTEND_S

    def _submit_after(self, pause_s: float, reading: Reading) -> None:
        heapq.heappush(self._waiting, (time.monotonic() + pause_s, next(self._order), reading))
        self._reads.notice()

    def _take_due(self) -> list[Reading]:
        due, now = [], time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            due.append(heapq.heappop(self._waiting)[2])
        return due

    def _submit_again(self, reading: Reading) -> None:
        """Submit a read whose file has to be opened, or opened again, which may take long: no lock is held."""
        try:
            self._open(reading.key)
        except Exception as error:
            failure = _unreadable(self._record_of(reading.key), error) if isinstance(error, OSError) else error
            with self.changed:
                self.give_up(reading, failure)
        else:
            with self.changed:
                super().submit(reading)

    def _open(self, key: int) -> None:
        """Open the files of a record that are not open, or again if others have taken their place. Raises: OSError."""
        for path in self._record_of(key).paths:
            self._files.open(path, self._reads.use_file)
        self._place(key)

    def _place(self, key: int) -> bool:
        """Give the reader the place of the record, if its files are open. Returns whether they are."""
        if self._reads.is_placed(key):
            return True
        record = self._record_of(key)
        number = self._files.number(record.path)
        if number is None or any(self._files.number(path) is None for path in record.paths):
            return False
        repacking = self._repackings[key]
        if record.windows:
            self._pieces[key] = self._pieces_of(record)
        pieces = self._pieces.get(key)
        place = PlaceStruct(
            file=number,
            offset=record.offset,
            num_bytes=record.num_bytes,
            checksum=record.checksum,
            pieces=ctypes.addressof(pieces) if pieces is not None else None,
            num_pieces=len(record.windows),
            matrices=repacking.order.address if repacking is not None else None,
            num_matrices=repacking.order.num_matrices if repacking is not None else 0,
            to_panels=repacking is not None and repacking.to_panels,
        )
        self._reads.place(key, place)
        return True

    def _pieces_of(self, record: Record) -> "ctypes.Array[PieceStruct]":
        return (PieceStruct * len(record.windows))(
            *(
                PieceStruct(
                    file=self._files.number(part.path),
                    **{
                        name: getattr(part, name)
                        for name in ("offset", "start", "num_bytes", "skew", "length", "target")
                    },
                )
                for part in record.windows
            )
        )


def _close(reads: Reads, files: RecordFiles, thread: threading.Thread) -> None:
    has_ended = reads.close()
    if thread is not threading.current_thread():  # else a collection of garbage runs there
        with suppress(RuntimeError):  # it was never started
            thread.join(JOIN_S)
    if has_ended:  # a thread that is still reading needs its file
        files.close()


def _damaged(record: Record) -> TransferError:
    return TransferError(
        f"{record.name}, {record.path} at offset {record.offset} ({record.num_bytes} bytes): it does not match its "
        "checksum. Check the disk; `offload-moe verify` lists what is damaged."
    )


def _failed(record: Record, completion: Completion) -> TransferError:
    if completion.error == SHORT_READ:
        why = f"short read, {completion.num_read} of {completion.num_bytes} bytes"
        return _reading_failed(record, completion.start, why)
    why = os.strerror(completion.error)
    error = _reading_failed(record, completion.start, why)
    error.__cause__ = OSError(completion.error, why, str(record.place_at(completion.start)[0]))
    return error


def _unreadable(record: Record, cause: OSError) -> TransferError:
    """The error for a file that could not be opened."""
    error = _reading_failed(record, 0, cause.strerror or str(cause))
    error.__cause__ = cause
    return error


def _reading_failed(record: Record, start: int, why: str) -> TransferError:
    path, offset = record.place_at(start)
    return TransferError(
        f"Reading {record.name} from {path} at offset {offset} failed: {why}. Check that the store is still "
        "there and its disk works, then try again; `offload-moe verify` checks the store."
    )
