"""Reads of records into the slots of one arena, by native threads: a queue of what to read, and one of completions."""

import ctypes
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from offload_moe.errors import ModelClosed
from offload_moe.native.bindings import library
from offload_moe.native.library import load_for_short_calls
from offload_moe.native.slot_table import SlotTable
from offload_moe.native.structs import CompletionStruct, FileStruct, PlaceStruct, ReadsOptionsStruct
from offload_moe.system.lifecycle import CLOSED, finalize

POLL_S = 0.1  # the longest native wait: signals are handled between two
_COMPLETION_ROOM = 256
_CLOSE_LIMIT_S = 5.0  # a thread that is stuck in a read must not keep the process from ending
_STUCK: list[object] = []  # memory and files that a thread may still use
_READ_AT = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
_kept: list[object] = []  # functions of `read_with`, which a thread may still execute

ReadAt = Callable[[int, int, int, int], int]  # descriptor, address, bytes, offset -> bytes, or a negative errno


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSizes:
    """Number of threads that read, and bytes that each of them reads at once.

    scratch_bytes: that each of them needs to bring a record into panels.
    """

    num_threads: int
    part_bytes: int
    prefetch_part_bytes: int
    scratch_bytes: int = 0


class Completion(NamedTuple):
    """A change of a read.

    READING: a token pass has begun it, in a slot that was reserved. DONE: its expert has arrived. DROPPED: a guess of a
    token pass was wrong, and its slot is reserved again. FAILED: the slot belongs to Python, which may submit the read
    again; the expert counts as on its way until then, or until the slot is vacated.

    error: an errno, SHORT_READ or WRONG_CHECKSUM; 0 unless FAILED. start, num_bytes, num_read: of the part of
    the record that failed, in bytes. was_direct: it was read around the page cache.
    """

    key: int
    slot: int
    state: int
    was_prefetch: bool = False
    error: int = 0
    start: int = 0
    num_bytes: int = 0
    num_read: int = 0
    was_direct: bool = False


class Reads:
    """The reader of one arena. Safe to use from several threads."""

    def __init__(self, slot_table: SlotTable, sizes: ReadSizes, owner: object = None) -> None:
        """owner: of memory and files, which stay in use while a thread is stuck in a read. Raises: MemoryError."""
        num_keys = slot_table.num_keys
        self._places = (PlaceStruct * num_keys)()
        self._is_checked, self._counts = array("B", bytes(num_keys)), array("q", [0, 0])
        self._completions = (CompletionStruct * _COMPLETION_ROOM)()
        self._slot_table, self._owner = slot_table, owner
        options = ReadsOptionsStruct(
            part_bytes=sizes.part_bytes,
            prefetch_part_bytes=sizes.prefetch_part_bytes,
            num_keys=num_keys,
            places=ctypes.addressof(self._places),
            is_checked=self._is_checked.buffer_info()[0],
            counts=self._counts.buffer_info()[0],
            scratch_bytes=sizes.scratch_bytes,
            num_threads=sizes.num_threads,
        )
        native, short = library(), load_for_short_calls()
        handle: int | None = native.om_reads_open(slot_table.handle, ctypes.addressof(options))
        if not handle:
            raise MemoryError("No memory for the threads that read experts.")
        self._handle: int = handle
        self._submit, self._demand, self._cancel = short.om_reads_submit, short.om_reads_demand, short.om_reads_cancel
        self._take, self._wake = short.om_reads_completions, short.om_reads_wake
        self._reserve, self._reclaim = short.om_reads_reserve, short.om_reads_reclaim
        self._wait, self._attend = native.om_reads_wait, native.om_reads_attend
        used = (self._places, self._is_checked, self._counts, slot_table.memory, owner)
        # Freed after it is closed, and not at exit: token passes of daemon threads may use it.
        finalize(self, native.om_reads_leave, handle).atexit = False
        self._close = finalize(self, _close, handle, used)

    @property
    def handle(self) -> int:
        """The address of the native reader. Raises: ModelClosed."""
        if not self._close.alive:
            raise ModelClosed(CLOSED)
        return self._handle

    @property
    def num_keys(self) -> int:
        """Experts of the model."""
        return self._slot_table.num_keys

    def use_file(self, number: int, file: FileStruct) -> None:
        """Read parts that begin from now on from this file, which replaces the one with its number.

        Raises: MemoryError.
        """
        if library().om_reads_use_file(self.handle, number, ctypes.addressof(file)):
            raise MemoryError("No memory for the list of open files.")

    def place(self, key: int, place: PlaceStruct) -> None:
        """Set the place of an expert's record. Required before it is read; its file must be in use."""
        self._places[key] = place

    def trust(self) -> None:
        """Count every checksum as compared: none is compared from now on, unless a read goes wrong."""
        self._set_checked(True)

    def check_again(self) -> None:
        """Compare the checksum of every expert at its next read again."""
        self._set_checked(False)

    def is_placed(self, key: int) -> bool:
        """Whether the place of the expert's record is set."""
        return bool(self._places[key].num_bytes > 0)

    def num_bytes(self, key: int) -> int:
        """Bytes of the expert's record."""
        return int(self._places[key].num_bytes)

    def read_with(self, read_at: ReadAt | None) -> None:
        """Read parts with this function from now on, on the reader's threads; None: with the system's. For tests."""
        function = None if read_at is None else _READ_AT(read_at)
        _kept.append(function)
        library().om_reads_read_with(self.handle, ctypes.cast(function, ctypes.c_void_p) if function else None)

    def submit(self, key: int, slot: int, *, is_prefetch: bool = False) -> None:
        """Queue the read of a record into a slot. A closed reader drops it. Raises: MemoryError."""
        if self._submit(self._handle, key, slot, self._slot_table.address(slot), is_prefetch) < 0:
            raise MemoryError("No memory for the queue of reads.")

    def demand(self, key: int) -> None:
        """Promote the read of an expert, if it is on its way: it overtakes prefetches and cannot be dropped."""
        self._demand(self._handle, key)

    def cancel(self, key: int) -> bool:
        """Cancel a submitted prefetch unless a part of it is being read. Returns whether it is cancelled."""
        return bool(self._cancel(self._handle, key))

    def reserve(self, slot: int) -> None:
        """Reserve a slot for token passes, 128 at most at a time."""
        self._reserve(self.handle, slot, self._slot_table.address(slot))

    def need_below(self, least_slots: int) -> None:
        """With fewer reserved slots left a token pass needs slots; guesses leave half of so many."""
        library().om_reads_need_below(self.handle, least_slots)

    def reclaim(self) -> list[int]:
        """Reclaim the slots that are reserved and not in use."""
        slots = []
        while (slot := self._reclaim(self.handle)) >= 0:
            slots.append(slot)
        return slots

    @property
    def num_completions(self) -> int:
        """Completions to drain, read from memory that the threads write to."""
        return self._counts[0]

    @property
    def num_wakes(self) -> int:
        """The number of calls of `wake`, for `wait`."""
        return self._counts[1]

    def completions(self) -> list[Completion]:
        """The completions since the last call, in the order in which they happened. For one thread at a time."""
        found: list[Completion] = []
        buffer = self._completions
        while count := self._take(self._handle, ctypes.addressof(buffer), _COMPLETION_ROOM):
            found += [_completion(buffer[at]) for at in range(count)]
        return found

    def wait(self, num_wakes: int, limit_s: float) -> None:
        """Wait until a read has ended that is not drained, or `num_wakes` has changed; `POLL_S` at most."""
        self._wait(self._handle, num_wakes, min(limit_s, POLL_S))

    def wake(self) -> None:
        """End all calls of `wait`."""
        self._wake(self._handle)

    def attend(self, limit_s: float) -> bool:
        """Wait until completions need draining and no thread is in `wait`, or for `notice`. False once closed."""
        return bool(self._attend(self._handle, limit_s))

    def notice(self) -> None:
        """End a call of `attend`."""
        library().om_reads_notice(self._handle)

    def close(self) -> bool:
        """Finish parts that are being read. Returns False if that takes too long: then memory and files stay in use."""
        return self._close() is not False

    def _set_checked(self, is_checked: bool) -> None:
        for key in range(self.num_keys):
            self._is_checked[key] = is_checked


def _completion(struct: CompletionStruct) -> Completion:
    return Completion(
        key=struct.key,
        slot=struct.slot,
        state=struct.state,
        was_prefetch=bool(struct.was_prefetch),
        error=struct.error,
        start=struct.start,
        num_bytes=struct.num_bytes,
        num_read=struct.num_read,
        was_direct=bool(struct.was_direct),
    )


def _close(handle: int, used: object) -> bool:
    if library().om_reads_close(handle, _CLOSE_LIMIT_S):
        return True
    _STUCK.append(used)
    return False
