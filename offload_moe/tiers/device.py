"""The device tier: fills VRAM slots from the RAM tier."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from offload_moe.errors import TransferError
from offload_moe.tiers.copier import Copier, Marker
from offload_moe.tiers.mover import Arrived
from offload_moe.tiers.workers import TransferWorkers

NUM_LOADERS = 4  # experts on their way at once: each may be waiting for a disk read of its own

Borrow = Callable[[int], AbstractContextManager[Tensor]]


class DeviceSlots:
    """VRAM slots of equal size, allocated in chunks."""

    def __init__(self, copier: Copier, num_slots: int, slot_bytes: int, chunk_bytes: int = 256 << 20) -> None:
        per_chunk = max(1, chunk_bytes // slot_bytes)
        self._slots: list[Tensor] = []
        for first in range(0, num_slots, per_chunk):
            chunk = copier.allocate(min(per_chunk, num_slots - first) * slot_bytes)
            self._slots += chunk.split(slot_bytes)

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
        self._readers: dict[int, dict[int, Marker]] = {}  # slot -> stream -> the point behind its last reader there
        self._workers = TransferWorkers(NUM_LOADERS, "expert-h2d")

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        self._workers.submit(slot, partial(self._load, key, slot, arrived), is_prefetch=is_prefetch)

    def hurry(self, slot: int) -> None:
        self._workers.hurry(slot)

    def used(self, slots: Sequence[int]) -> None:
        marker = self._copier.mark()
        for slot in slots:
            self._readers.setdefault(slot, {})[marker.stream_id] = marker

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
        try:
            arrival = self._copier.copy(record, self._slots.slot(slot)[: record.numel()], after=readers.values())
            arrival.wait()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise TransferError(
                f"Copying expert record {key} ({record.numel()} bytes) to the device failed: {reason}. "
                "Load the model again; a smaller --vram helps if the device ran out of memory."
            ) from error
        readers.clear()
