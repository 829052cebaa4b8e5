"""The list of changes that the host wants in the tables of a pass."""

import ctypes
from functools import cache

import numpy as np

from offload_moe.card.structs import constant
from offload_moe.native.session import Session, SharedMemory

_EDIT = np.dtype([("kind", np.int32), ("index", np.int32), ("value", np.uint64)])
_MASK = (1 << 64) - 1


class Edits:
    """Collected here, applied by one kernel, whose threads may come in any order: one change of each number."""

    def __init__(self, session: Session, capacity: int) -> None:
        """capacity: the most that are collected. Raises: BudgetError."""
        self._memory = SharedMemory(session, capacity * _EDIT.itemsize)
        buffer = (ctypes.c_byte * (capacity * _EDIT.itemsize)).from_address(self._memory.host)
        self._list = np.frombuffer(memoryview(buffer), dtype=_EDIT)
        self._places: dict[tuple[str, int], int] = {}

    @property
    def host(self) -> int:
        return self._memory.host

    @property
    def address(self) -> int:
        return self._memory.address

    def add(self, kind: str, value: int, index: int = 0) -> None:
        """Change one number, instead of an earlier change; kind: as in `pass.h`, without its prefix."""
        place = self._places.setdefault((kind, index), len(self._places))
        self._list[place] = (_kind(kind), index, value & _MASK)

    def close(self) -> None:
        """Free the list."""
        self._memory.close()

    def take(self) -> int:
        """How many there are; the next list begins."""
        count = len(self._places)
        self._places.clear()
        return count


@cache
def _kind(name: str) -> int:
    return constant(f"OM_EDIT_{name}")
