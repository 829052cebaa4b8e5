"""The RAM arena: equal slots of page-aligned memory, in chunks that no slot straddles."""

import mmap
import sys
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from offload_moe.errors import BudgetError
from offload_moe.quant.layout import RECORD_ALIGNMENT, round_up
from offload_moe.system.sizes import format_size

CHUNK_BYTES = 256 << 20
MADV_WIPEONFORK = 18  # Linux 4.14, asm-generic/mman-common.h


class Arena:
    """``num_slots`` slots of ``slot_bytes`` bytes. Pages are committed when first written, not before.

    Memory is mapped here rather than by torch, whose pinned allocator rounds up to a power of two. A slot that is given
    up keeps its address and loses its pages, so a stale view of it reads zeros.
    """

    def __init__(self, num_slots: int, slot_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Map the slots. Raises: BudgetError when the system refuses the address space."""
        self.num_slots = 0
        self.slot_bytes = round_up(slot_bytes, RECORD_ALIGNMENT)
        self._slots_per_chunk = max(1, chunk_bytes // self.slot_bytes)
        self._mappings: list[mmap.mmap] = []
        self._chunks: list[Tensor] = []
        self._firsts: list[int] = []  # the first slot of each chunk
        self.addresses = array("Q")  # of every slot
        self._slots: dict[int, Tensor] = {}  # a view costs a microsecond to make, and a layer needs many
        self.grow(num_slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.slot_bytes

    @property
    def chunk_sizes(self) -> list[int]:
        """Slots of each chunk, those given up included."""
        return [chunk.numel() // self.slot_bytes for chunk in self._chunks]

    def slot(self, index: int) -> Tensor:
        """The slot's memory: uint8 ``[slot_bytes]``, aligned to a page."""
        slot = self._slots.get(index)
        if slot is None:
            chunk = bisect_right(self._firsts, index) - 1
            first = (index - self._firsts[chunk]) * self.slot_bytes
            slot = self._slots[index] = self._chunks[chunk][first : first + self.slot_bytes]
        return slot

    def grow(self, num_slots: int) -> None:
        """Map slots up to `num_slots`.

        Raises: BudgetError when the system refuses the address space; `num_slots` has not changed then.
        """
        while (missing := num_slots - sum(self.chunk_sizes)) > 0:
            self._map(min(self._slots_per_chunk, missing), num_slots)
        self.num_slots = num_slots

    def shrink(self, num_slots: int) -> None:
        """Return the pages of the slots from `num_slots` on to the system. They must be neither in use nor page-locked.

        Without `madvise` (Windows) no part of a mapping can be returned: there the pages stay.
        """
        self.num_slots = num_slots
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for first_slot, mapping in zip(self._firsts, self._mappings, strict=True):
            first = max(0, num_slots - first_slot) * self.slot_bytes
            if first < len(mapping):
                mapping.madvise(mmap.MADV_DONTNEED, first, len(mapping) - first)

    def chunks_behind(self, num_slots: int) -> list[Tensor]:
        """The chunks that hold a slot from `num_slots` on, whole."""
        ends = [first + size for first, size in zip(self._firsts, self.chunk_sizes, strict=True)]
        return [chunk for chunk, end in zip(self._chunks, ends, strict=True) if end > num_slots]

    def _map(self, num_slots: int, num_in_all: int) -> None:
        num_bytes = num_slots * self.slot_bytes
        try:
            mapping = _anonymous(num_bytes)
        except OSError as error:
            raise BudgetError(
                f"The RAM arena needs {format_size(num_in_all * self.slot_bytes)} for {num_in_all} slots and the "
                f"system refused a chunk of {format_size(num_bytes)} ({error.strerror}). Try a smaller --ram."
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        _keep_from_children(mapping)
        self._firsts.append(sum(self.chunk_sizes))
        self._mappings.append(mapping)
        with torch.inference_mode(False):  # transfer threads write to it, whatever mode it is made in
            self._chunks.append(chunk := torch.frombuffer(mapping, dtype=torch.uint8))
        self.addresses.extend(range(chunk.data_ptr(), chunk.data_ptr() + num_bytes, self.slot_bytes))


def whole_chunks(chunk_sizes: Sequence[int], num_slots: int) -> int:
    """Slots of the whole chunks within `num_slots`, at least the first; `num_slots` if it exceeds all of them."""
    kept = chunk_sizes[0]
    for size in chunk_sizes[1:]:
        if kept + size > num_slots:
            return kept
        kept += size
    return max(kept, num_slots)


def _keep_from_children(mapping: mmap.mmap) -> None:
    """Make the pages zeros in a forked process.

    Shared pages would be copied at the next write, and a direct read under way could end in the child's copy: see
    open(2) on O_DIRECT and fork.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # an older kernel
            mapping.madvise(MADV_WIPEONFORK)


def _anonymous(num_bytes: int) -> mmap.mmap:
    """Map private pages: unlike those of a shared mapping, Python's default, they can be returned one by one."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, num_bytes)
