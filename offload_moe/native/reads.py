"""Reads of a native token pass, into slots that were reserved for them."""

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from offload_moe.errors import ModelClosed
from offload_moe.native.bindings import library
from offload_moe.native.slot_table import SlotTable
from offload_moe.native.structs import CompletionStruct, FileStruct, PlaceStruct, ReadsOptionsStruct
from offload_moe.system.lifecycle import CLOSED, finalize

_COMPLETION_ROOM = 256
_CLOSE_LIMIT_S = 5.0  # a thread that is stuck in a dead disk must not keep the process from ending
_STUCK: list[object] = []  # memory and files that a thread may still use


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSizes:
    """Threads that read, and bytes that each of them reads at once."""

    num_threads: int
    part_bytes: int
    prefetch_part_bytes: int


class Reads:
    """A queue of its own for one pool, beside the one of its mover. Safe to use from several threads."""

    def __init__(
        self,
        slot_table: SlotTable,
        files: Sequence[FileStruct],
        places: Sequence[PlaceStruct],
        sizes: ReadSizes,
        owner: object = None,
    ) -> None:
        """places: by key. owner: of memory and files."""
        self._files = (FileStruct * len(files))(*files)
        self._places = (PlaceStruct * len(places))(*places)
        self._is_checked = array("B", bytes(len(places)))
        self._completions = (CompletionStruct * _COMPLETION_ROOM)()
        self._slot_table, self._owner = slot_table, owner
        options = ReadsOptionsStruct(
            part_bytes=sizes.part_bytes,
            prefetch_part_bytes=sizes.prefetch_part_bytes,
            places=ctypes.addressof(self._places),
            files=ctypes.addressof(self._files),
            is_checked=self._is_checked.buffer_info()[0],
            num_threads=sizes.num_threads,
        )
        handle = library().om_reads_open(slot_table.handle, ctypes.addressof(options))
        if not handle:
            raise MemoryError("No memory for the threads that read experts.")
        self._handle = handle
        used = (self._files, self._places, self._is_checked, slot_table.memory, owner)
        self._close = finalize(self, _close, handle, used)

    @property
    def handle(self) -> int:
        """Raises: ModelClosed."""
        if not self._close.alive:
            raise ModelClosed(CLOSED)
        return self._handle

    def num_bytes(self, key: int) -> int:
        """Of the expert's record."""
        return int(self._places[key].num_bytes)

    def reserve(self, slot: int) -> None:
        """No more than 128 at a time."""
        library().om_reads_reserve(self.handle, slot, self._slot_table.address(slot))

    def ask_below(self, least_slots: int) -> None:
        """With fewer reserved slots left a token pass needs slots; guesses leave half of so many."""
        library().om_reads_ask_below(self.handle, least_slots)

    def demand(self, key: int) -> None:
        """Mark the read of an expert as demanded, if it is on its way: it is not dropped any more."""
        library().om_reads_demand(self.handle, key)

    def reclaim(self) -> Iterator[int]:
        """Slots that were reserved and are not in use."""
        while (slot := library().om_reads_reclaim(self.handle)) >= 0:
            yield slot

    def completions(self) -> Iterator[CompletionStruct]:
        """The completions since the last call, in the order in which they happened.

        READING: a reserved slot is being filled. DONE: its expert is resident. DROPPED: it is reserved and empty.
        FAILED: it is not reserved any more; the expert counts as on its way until it is published or withdrawn.
        """
        while count := library().om_reads_completions(
            self.handle, ctypes.addressof(self._completions), _COMPLETION_ROOM
        ):
            yield from self._completions[:count]

    def close(self) -> bool:
        """Finish what is being read. False where that takes too long: then its memory and files stay in use."""
        return self._close() is not False


def _close(handle: int, used: object) -> bool:
    if library().om_reads_close(handle, _CLOSE_LIMIT_S):
        return True
    _STUCK.append(used)
    return False
