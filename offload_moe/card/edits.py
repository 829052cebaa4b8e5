"""The list of changes that the host wants in the tables of a pass."""

import ctypes
from collections.abc import Iterable

import numpy as np

from offload_moe.card.structs import constant
from offload_moe.native.session import Session, SharedMemory

_EDIT = np.dtype([("kind", np.int32), ("index", np.int32), ("value", np.uint64)])
_MASK = (1 << 64) - 1


class Edits:
    """Collected here, applied by one kernel. No two have the same kind and index."""

    def __init__(self, session: Session, capacity: int) -> None:
        """capacity: the most that are collected. Raises: BudgetError."""
        self._memory = SharedMemory(session, capacity * _EDIT.itemsize)
        buffer = (ctypes.c_byte * (capacity * _EDIT.itemsize)).from_address(self._memory.host)
        self._list = np.frombuffer(buffer, dtype=_EDIT)
        self.count = 0

    @property
    def host(self) -> int:
        return self._memory.host

    @property
    def address(self) -> int:
        return self._memory.address

    def add(self, kind: str, value: int, index: int = 0) -> None:
        """Change one number; kind: as in `pass.h`, without its prefix."""
        self._list[self.count] = (constant(f"OM_EDIT_{kind}"), index, value & _MASK)
        self.count += 1

    def add_many(self, kind: str, indices: Iterable[int], values: Iterable[int]) -> None:
        """Change a number for each index."""
        where = np.fromiter(indices, dtype=np.int32)
        part = self._list[self.count : self.count + len(where)]
        part["kind"], part["index"] = constant(f"OM_EDIT_{kind}"), where
        part["value"] = np.fromiter(values, dtype=np.int64).view(np.uint64)
        self.count += len(where)

    def take(self) -> int:
        """How many there are; the next list begins."""
        count, self.count = self.count, 0
        return count
