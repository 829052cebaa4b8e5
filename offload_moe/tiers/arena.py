"""The RAM arena: equal slots of page-aligned memory, in chunks that no slot straddles."""

import mmap

import torch
from torch import Tensor

from offload_moe.errors import BudgetError
from offload_moe.quant.layout import RECORD_ALIGNMENT, round_up

CHUNK_BYTES = 256 << 20


class Arena:
    """``num_slots`` slots of ``slot_bytes`` bytes. Pages are committed when first written, not before.

    Memory is mapped by us rather than by torch, whose pinned allocator rounds up to a power of two.
    """

    def __init__(self, num_slots: int, slot_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Raises: BudgetError when the address space cannot be had."""
        self.num_slots = num_slots
        self.slot_bytes = round_up(slot_bytes, RECORD_ALIGNMENT)
        self._slots_per_chunk = max(1, chunk_bytes // self.slot_bytes)
        self._chunks: list[Tensor] = []
        self._slots: dict[int, Tensor] = {}  # a view costs a microsecond to make, and a layer asks for many
        for first in range(0, num_slots, self._slots_per_chunk):
            self._chunks.append(self._map(min(self._slots_per_chunk, num_slots - first) * self.slot_bytes))

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.slot_bytes

    def slot(self, index: int) -> Tensor:
        """The slot's memory: uint8 ``[slot_bytes]``, aligned to a page."""
        slot = self._slots.get(index)
        if slot is None:
            chunk, place = divmod(index, self._slots_per_chunk)
            slot = self._slots[index] = self._chunks[chunk][place * self.slot_bytes : (place + 1) * self.slot_bytes]
        return slot

    def _map(self, num_bytes: int) -> Tensor:
        try:
            memory = mmap.mmap(-1, num_bytes)
        except OSError as error:
            raise BudgetError(
                f"The RAM arena needs {self.num_bytes / 2**30:.1f} GiB for {self.num_slots} slots and the system "
                f"refused a chunk of {num_bytes / 2**20:.0f} MiB ({error.strerror}). Try a smaller --ram."
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)
