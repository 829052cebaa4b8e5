"""The list of changes that the host makes in the tables of a pass."""

import ctypes
from functools import cache

import numpy as np
from numpy.typing import NDArray

from offload_moe.card.structs import constant
from offload_moe.native.session import Session, SharedMemory

_EDIT = np.dtype([("kind", np.int32), ("index", np.int32), ("value", np.uint64)])
_MASK = (1 << 64) - 1
_TAKEN, _NOT_GIVEN = 0, -1


class Edits:
    """Collected here, applied by one kernel, whose threads may come in any order: one change of each number.

    A list that is given is taken by native code as it queues that kernel; what is added until then belongs to it.
    """

    def __init__(self, session: Session, capacity: int) -> None:
        """capacity: the most that are collected. Raises: BudgetError."""
        self._memory = SharedMemory(session, capacity * _EDIT.itemsize)
        self._list = self._memory.array(_EDIT)
        self._places: dict[tuple[str, int], int] = {}
        self._many = np.empty(0, dtype=_EDIT)  # all of one kind
        self._count = ctypes.c_int64(_NOT_GIVEN)

    @property
    def host(self) -> int:
        return self._memory.host

    @property
    def address(self) -> int:
        return self._memory.address

    @property
    def count_address(self) -> int:
        """Of how many are given."""
        return ctypes.addressof(self._count)

    def add(self, kind: str, value: int, index: int = 0) -> None:
        """Change one number, instead of an earlier change; kind: as in `pass.h`, without its prefix."""
        self._begin_list()
        place = self._places.get((kind, index), len(self._places))
        self._list[place] = (_kind(kind), index, value & _MASK)
        self._places[kind, index] = place

    def add_many(self, kind: str, indices: NDArray[np.int64], values: NDArray[np.uint64]) -> None:
        """Change numbers of one kind, which is the same for all calls and which `add` never has.

        They are kept apart until the list is given: the card may be reading the last one.
        """
        self._begin_list()
        added = np.empty(len(indices), dtype=_EDIT)
        added["kind"], added["index"], added["value"] = _kind(kind), indices, values
        earlier = self._many[~np.isin(self._many["index"], indices)] if len(self._many) else self._many
        self._many = np.concatenate([earlier, added])

    def give(self) -> None:
        """Let native code take the list."""
        self._begin_list()
        first = len(self._places)
        count = first + len(self._many)
        self._list[first:count] = self._many
        self._count.value = count

    def close(self) -> None:
        """Free the list."""
        self._memory.close()

    def _begin_list(self) -> None:
        if self._count.value == _TAKEN:
            self._places.clear()
            self._many = self._many[:0]
            self._count.value = _NOT_GIVEN


@cache
def _kind(name: str) -> int:
    return constant(f"OM_EDIT_{name}")
