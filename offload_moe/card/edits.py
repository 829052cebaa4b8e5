"""The list of changes that the host makes in the tables of a pass."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from offload_moe.card.structs import constant
from offload_moe.native.session import Session, SharedMemory

_EDIT = np.dtype([("kind", np.int32), ("index", np.int32), ("value", np.uint64)])
_MASK = (1 << 64) - 1


class Edits:
    """Collected here, applied by one kernel, whose threads may come in any order: one change of each number."""

    def __init__(self, session: Session, capacity: int) -> None:
        """capacity: the most that are collected. Raises: BudgetError."""
        self._memory = SharedMemory(session, capacity * _EDIT.itemsize)
        self._list = self._memory.array(_EDIT)
        self._places: dict[tuple[str, int], int] = {}
        self._many = np.empty(0, dtype=_EDIT)  # all of one kind

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

    def add_many(self, kind: str, indices: NDArray[np.int64], values: NDArray[np.uint64]) -> None:
        """Change numbers of one kind, which is the same for all calls and which `add` never has."""
        added = np.empty(len(indices), dtype=_EDIT)
        added["kind"], added["index"], added["value"] = _kind(kind), indices, values
        earlier = self._many[~np.isin(self._many["index"], indices)]
        self._many = np.concatenate([earlier, added])

    def close(self) -> None:
        """Free the list."""
        self._memory.close()

    def take(self) -> int:
        """How many there are; the next list begins."""
        first = len(self._places)
        count = first + len(self._many)
        self._list[first:count] = self._many
        self._places.clear()
        self._many = self._many[:0]
        return count


@cache
def _kind(name: str) -> int:
    return constant(f"OM_EDIT_{name}")
