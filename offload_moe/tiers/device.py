"""The device tier: fills VRAM slots from the RAM tier."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from offload_moe.errors import BudgetError, TransferError
from offload_moe.sizes import format_size
from offload_moe.tiers.arena import CHUNK_BYTES
from offload_moe.tiers.copier import Copier, Marker
from offload_moe.tiers.mover import Arrived
from offload_moe.tiers.pace import LinkPace
from offload_moe.tiers.workers import TransferWorkers

NUM_LOADERS = 4  # experts on their way at once: each may be waiting for a disk read of its own

Borrow = Callable[[int], AbstractContextManager[Tensor]]


class DeviceSlots:
    """VRAM slots of equal size, allocated in chunks; the last chunks can be given back."""

    def __init__(self, copier: Copier, num_slots: int, slot_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Raises: BudgetError when the device has less memory."""
        self._copier = copier
        self._slot_bytes = slot_bytes
        self._per_chunk = max(1, chunk_bytes // slot_bytes)
        self._chunks: list[Tensor] = []
        self._slots: list[Tensor] = []
        self.grow(num_slots)

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def chunk_sizes(self) -> list[int]:
        """Slots of each chunk."""
        return [chunk.numel() // self._slot_bytes for chunk in self._chunks]

    def grow(self, num_slots: int) -> None:
        """Raises: BudgetError when the device has less memory; nothing has changed then."""
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
        """Give back the chunks behind the first `num_slots` slots. No copy or compute may be under way there."""
        while self.num_slots > num_slots:
            chunk = self._chunks.pop()
            del self._slots[-(chunk.numel() // self._slot_bytes) :]
            self._copier.free(chunk)
        assert self.num_slots == num_slots

    def slot(self, index: int) -> Tensor:
        """uint8 ``[slot_bytes]`` on the device."""
        return self._slots[index]


class DeviceMover:
    """Copies records from the RAM tier; a RAM slot stays leased until its copy is done."""

    def __init__(self, copier: Copier, slots: DeviceSlots, borrow: Borrow) -> None:
        """borrow: key -> context manager that leases the record in the RAM tier, reading it from disk if need be."""
        self._copier = copier
        self._slots = slots
        self._borrow = borrow
        self.pace = LinkPace()
        self._readers: dict[int, dict[int, Marker]] = {}  # slot -> stream -> the point behind its last reader there
        self._workers = TransferWorkers(NUM_LOADERS, "expert-h2d")

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        self._workers.submit(slot, [partial(self._load, key, slot, arrived)], is_prefetch=is_prefetch)

    def hurry(self, slot: int) -> None:
        self._workers.hurry(slot)

    def cancel(self, slot: int) -> bool:
        return self._workers.cancel(slot)

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
        self._workers.close()
        self._copier.close()

    def _load(self, key: int, slot: int, arrived: Arrived) -> None:
        try:
            with self._borrow(key) as record:
                self._copy(key, slot, record)
                num_bytes = record.numel()
        except BaseException as error:
            arrived(slot, 0, error)
        else:
            arrived(slot, num_bytes, None)

    def _copy(self, key: int, slot: int, record: Tensor) -> None:
        """The slot's readers are forgotten only once it is overwritten: a load that fails leaves them to the next."""
        readers = self._readers.get(slot, {})
        began, has_arrived = self.pace.begin(), False
        try:
            arrival = self._copier.copy(record, self._slots.slot(slot)[: record.numel()], after=readers.values())
            arrival.wait()
            has_arrived = True
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise TransferError(
                f"Copying expert record {key} ({record.numel()} bytes) to the device failed: {reason}. "
                "Load the model again; a smaller --vram helps if the device ran out of memory."
            ) from error
        finally:
            self.pace.end(began, has_arrived=has_arrived)
        readers.clear()
