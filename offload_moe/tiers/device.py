"""The device tier: fills VRAM slots from the RAM tier."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

from torch import Tensor

from offload_moe.tiers.copier import Copier, Marker
from offload_moe.tiers.mover import Arrived

NUM_LOADERS = 4  # experts on their way at once: each may be waiting for a disk read of its own

Borrow = Callable[[int], AbstractContextManager[Tensor]]


class DeviceSlots:
    """VRAM slots of equal size, allocated in chunks."""

    def __init__(self, copier: Copier, num_slots: int, slot_bytes: int, chunk_bytes: int = 256 << 20) -> None:
        self._slot_bytes = slot_bytes
        self._per_chunk = max(1, chunk_bytes // slot_bytes)
        self._chunks = [
            copier.allocate(min(self._per_chunk, num_slots - first) * slot_bytes)
            for first in range(0, num_slots, self._per_chunk)
        ]

    def slot(self, index: int) -> Tensor:
        """uint8 ``[slot_bytes]`` on the device."""
        chunk, place = divmod(index, self._per_chunk)
        return self._chunks[chunk][place * self._slot_bytes : (place + 1) * self._slot_bytes]


class DeviceMover:
    """Copies records from the RAM tier; a RAM slot stays leased until its copy is done."""

    def __init__(self, copier: Copier, slots: DeviceSlots, borrow: Borrow) -> None:
        """borrow: key -> context manager that leases the record in the RAM tier, reading it from disk if need be."""
        self._copier = copier
        self._slots = slots
        self._borrow = borrow
        self._last_use: dict[int, Marker] = {}
        self._pool = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="expert-h2d")

    def start(self, key: int, slot: int, arrived: Arrived) -> None:
        self._pool.submit(self._load, key, slot, self._last_use.pop(slot, None), arrived)

    def used(self, slot: int) -> None:
        self._last_use[slot] = self._copier.mark()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, key: int, slot: int, last_use: Marker | None, arrived: Arrived) -> None:
        try:
            with self._borrow(key) as record:
                destination = self._slots.slot(slot)[: record.numel()]
                self._copier.copy(record, destination, after=last_use).wait()
                num_bytes = record.numel()
        except BaseException as error:
            arrived(slot, 0, error)
        else:
            arrived(slot, num_bytes, None)
