"""The device tier: fills VRAM slots from the RAM tier."""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from offload_moe.errors import BudgetError, TransferError
from offload_moe.memory.arena import CHUNK_BYTES
from offload_moe.memory.copier import Copier, Marker
from offload_moe.memory.flights import Flight, Flights
from offload_moe.memory.mover import Arrived
from offload_moe.memory.pace import LinkPace
from offload_moe.memory.workers import TransferWorkers
from offload_moe.system.sizes import format_size

NUM_LOADERS = 4  # each may be waiting for a disk read of its own
MAX_PREFETCHES_FLYING = 2  # a copy that was issued cannot be overtaken


class DeviceSlots:
    """VRAM slots of equal size, allocated in chunks; the last chunks can be given back."""

    def __init__(self, copier: Copier, num_slots: int, slot_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Allocate the slots. Raises: BudgetError when the device has less memory."""
        self._copier = copier
        self._slot_bytes = slot_bytes
        self._per_chunk = max(1, chunk_bytes // slot_bytes)
        self._chunks: list[Tensor] = []
        self._slots: list[Tensor] = []
        self.grow(num_slots)

    @property
    def num_slots(self) -> int:
        """Slots of all chunks."""
        return len(self._slots)

    @property
    def chunk_sizes(self) -> list[int]:
        """Slots of each chunk."""
        return [chunk.numel() // self._slot_bytes for chunk in self._chunks]

    def grow(self, num_slots: int) -> None:
        """Allocate slots up to `num_slots`.

        Raises: BudgetError when the device has less memory; nothing has changed then.
        """
        num_before = self.num_slots
        while (missing := num_slots - self.num_slots) > 0:
            num_bytes = min(self._per_chunk, missing) * self._slot_bytes
            try:
                chunk = self._copier.allocate(num_bytes)
            except torch.OutOfMemoryError as error:
                num_had = self.num_slots
                self.shrink(num_before)
                raise BudgetError(
                    f"{num_slots} expert slots need {format_size(num_slots * self._slot_bytes)} of VRAM, and the "
                    f"device refused {format_size(num_bytes)} after {format_size(num_had * self._slot_bytes)}. "
                    "Try a smaller --vram, or close what else uses the device."
                ) from error
            self._chunks.append(chunk)
            self._slots += chunk.split(self._slot_bytes)

    def shrink(self, num_slots: int) -> None:
        """Free the chunks behind the first `num_slots` slots. No copy or compute may be under way there."""
        while self.num_slots > num_slots:
            chunk = self._chunks.pop()
            del self._slots[-(chunk.numel() // self._slot_bytes) :]
            self._copier.free(chunk)
        assert self.num_slots == num_slots

    def slot(self, index: int) -> Tensor:
        """uint8 ``[slot_bytes]`` on the device."""
        return self._slots[index]


Borrowed = tuple[Tensor, Callable[[], None]]  # a record, which stays where it is until the function is called


class Records(Protocol):
    """The RAM tier as a source of copies."""

    def borrow(self, key: int) -> Borrowed:
        """Lease a record, which is read from disk if it is not resident. Raises: TransferError."""

    def borrow_resident(self, key: int) -> Borrowed | None:
        """Lease a record that is resident; None where it would have to be read, or waited for."""


@dataclass(frozen=True, slots=True)
class _Load:
    key: int
    slot: int
    arrived: Arrived
    is_prefetch: bool


class DeviceMover:
    """Copies records from the RAM tier; a RAM slot stays leased until its copy has landed.

    A demand whose record is in RAM is issued at once, unless the thread that notices landings can issue it before the
    link is idle. That thread issues the other copies while the caller computes: demands first, then prefetches, few at
    a time, so that a later demand waits for few. Loader threads issue records that have to be read first, or to pass
    through the staging ring.
    """

    def __init__(self, copier: Copier, slots: DeviceSlots, records: Records) -> None:
        self._copier = copier
        self._slots = slots
        self._records = records
        self.pace = LinkPace()
        self.flights = Flights(copier, self.pace, self._issue_more)
        self._readers: dict[int, dict[int, Marker]] = {}  # slot -> stream -> the point behind its last reader there
        self._demands: deque[_Load] = deque()  # not issued yet; prefetches likewise, by slot
        self._prefetches: OrderedDict[int, _Load] = OrderedDict()
        self._loaders = TransferWorkers(NUM_LOADERS, "expert-h2d")

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        load = _Load(key, slot, arrived, is_prefetch)
        with self.flights.changed:
            if is_prefetch:
                self._prefetches[slot] = load
            elif self.flights.can_issue_in_time:
                self._demands.append(load)
            else:
                self._issue(load)
                return
            self.flights.request_issue()

    def promote(self, slot: int) -> None:
        with self.flights.changed:
            load = self._prefetches.pop(slot, None)
        if load is not None:
            self.start(load.key, slot, load.arrived)
        else:
            self._loaders.promote(slot)

    def cancel(self, slot: int) -> bool:
        with self.flights.changed:
            if self._prefetches.pop(slot, None) is not None:
                return True
        return self._loaders.cancel(slot)

    def drain(self) -> None:
        """Do nothing: a thread of its own notices landings."""

    def used(self, slots: Sequence[int]) -> None:
        marker = self._copier.mark()
        for slot in slots:
            self._readers.setdefault(slot, {})[marker.stream_id] = marker

    def wait_for_readers(self, slots: Sequence[int]) -> None:
        """Block until all compute that reads these slots is done."""
        for slot in slots:
            for marker in self._readers.pop(slot, {}).values():
                marker.wait()

    def close(self) -> None:
        with self.flights.changed:
            self._demands.clear()
            self._prefetches.clear()
        self._loaders.close()
        self.flights.close()
        self._copier.close()

    def _issue_more(self) -> None:
        while load := self._next_load():
            self._issue(load)

    def _next_load(self) -> _Load | None:
        with self.flights.changed:
            if self._demands:
                return self._demands.popleft()
            if self._prefetches and len(self.flights) < MAX_PREFETCHES_FLYING:
                return self._prefetches.popitem(last=False)[1]
            return None

    def _issue(self, load: _Load) -> None:
        """Issue the copy here if that does not block, else on a loader thread."""
        borrowed = self._records.borrow_resident(load.key)
        if borrowed is not None:
            record, give_back = borrowed
            if self._copier.is_direct(record):
                self._fly(load, record, give_back)
                return
            give_back()
        self._loaders.submit(load.slot, partial(self._fetch, load), is_prefetch=load.is_prefetch)

    def _fetch(self, load: _Load) -> None:
        try:
            record, give_back = self._records.borrow(load.key)
        except BaseException as error:
            load.arrived(load.slot, 0, error)
        else:
            self._fly(load, record, give_back)

    def _fly(self, load: _Load, record: Tensor, give_back: Callable[[], None]) -> None:
        """Issue the copy; what was borrowed is given back once it has landed.

        The slot's readers are cleared only when a copy over them is issued: a copy that fails leaves them to the next.
        """
        readers = self._readers.get(load.slot)
        marker, failed, began = None, None, self.pace.begin()
        try:
            marker = self._copier.copy(
                record, self._slots.slot(load.slot)[: record.numel()], after=readers.values() if readers else ()
            )
            if readers:
                readers.clear()
        except RuntimeError as error:
            failed = error
        land = partial(self._land, load, record.numel(), give_back)
        self.flights.add(Flight(load.slot, land, marker, began, failed, load.is_prefetch))

    @staticmethod
    def _land(load: _Load, num_bytes: int, give_back: Callable[[], None], error: BaseException | None) -> None:
        give_back()
        if error is None:
            load.arrived(load.slot, num_bytes, None)
            return
        failed = TransferError(
            f"Copying expert record {load.key} ({num_bytes} bytes) to the device failed: {str(error).splitlines()[0]}. "
            "Load the model again; a smaller --vram helps if the device ran out of memory."
        )
        failed.__cause__ = error
        load.arrived(load.slot, 0, failed)
