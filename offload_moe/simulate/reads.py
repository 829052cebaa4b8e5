"""Lookups and reads of a token pass in virtual time: the counterparts of `csrc/slot_table.c` and `csrc/reads.c`."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from offload_moe.native.kernels import DONE, DROPPED, READING
from offload_moe.simulate.disk import VirtualDisk


class VirtualSlotTable:
    """The experts that are resident or in flight, by key: a `residency.Lookup`."""

    def __init__(self) -> None:
        self._is_here: dict[int, bool] = {}  # False: in flight
        self._leases: Counter[int] = Counter()

    def claim(self, key: int) -> bool:
        is_absent = key not in self._is_here
        self._is_here.setdefault(key, False)
        return is_absent

    def publish(self, key: int, slot: int) -> None:
        self._is_here[key] = True

    def withdraw(self, key: int) -> bool:
        if self.is_leased(key):
            return False
        self._is_here.pop(key, None)
        return True

    def is_leased(self, key: int) -> bool:
        return self._leases[key] > 0

    def is_known(self, key: int) -> bool:
        """Whether the expert is resident or in flight."""
        return key in self._is_here

    def lease_those_here(self, keys: Iterable[int]) -> list[int]:
        """Lease the resident ones and return them."""
        here = [key for key in keys if self._is_here.get(key, False)]
        self._leases.update(here)
        return here

    def release(self, keys: Iterable[int]) -> None:
        self._leases.subtract(keys)


@dataclass(frozen=True, slots=True)
class _Completion:
    key: int
    slot: int
    state: int
    was_prefetch: bool


class VirtualReads:
    """The virtual `Reads` of `residency.reserved.ReservedSlots` and of a token pass, on the mover's disk."""

    def __init__(self, slot_table: VirtualSlotTable, disk: VirtualDisk) -> None:
        self._slot_table = slot_table
        self._disk = disk
        self._spares: list[int] = []
        self._least_spares = 0
        self._reading: dict[int, _Completion] = {}  # by slot
        self._completions: list[_Completion] = []

    @property
    def are_short(self) -> bool:
        """Whether a token pass should request more slots."""
        return len(self._spares) < self._least_spares

    def fetch(self, key: int, *, is_prefetch: bool = False) -> bool:
        """Start to read an absent expert into a reserved slot, if one is left; the last ones are for demands only."""
        if len(self._spares) <= (self._least_spares // 2 if is_prefetch else 0):
            return False
        slot = self._spares.pop()
        self._slot_table.claim(key)
        self._reading[slot] = self._say(key, slot, READING, is_prefetch)
        self._disk.fetch(key, slot, self._arrived, is_prefetch=is_prefetch)
        return True

    def demand(self, key: int) -> None:
        for slot, read in self._reading.items():
            if read.key == key:
                self._disk.promote(slot)

    def drop_wrong(self, end: int, wanted: Collection[int]) -> None:
        """Drop unused predictions for layers before that key, unless their reads have begun."""
        for slot, read in list(self._reading.items()):
            if read.was_prefetch and read.key < end and read.key not in wanted and self._disk.cancel(slot):
                del self._reading[slot]
                self._slot_table.withdraw(read.key)
                self._spares.append(slot)
                self._say(read.key, slot, DROPPED, was_prefetch=True)

    def reserve(self, slot: int) -> None:
        self._spares.append(slot)

    def ask_below(self, least_slots: int) -> None:
        self._least_spares = least_slots

    def reclaim(self) -> Iterator[int]:
        while self._spares:
            yield self._spares.pop()

    def completions(self) -> Sequence[_Completion]:
        completions, self._completions = self._completions, []
        return completions

    def num_bytes(self, key: int) -> int:
        return self._disk.record_bytes

    def close(self) -> None:
        pass

    def _arrived(self, slot: int, num_bytes: int, error: BaseException | None) -> None:
        read = self._reading.pop(slot)
        self._slot_table.publish(read.key, slot)
        self._say(read.key, slot, DONE, read.was_prefetch)

    def _say(self, key: int, slot: int, state: int, was_prefetch: bool) -> _Completion:
        completion = _Completion(key, slot, state, was_prefetch)
        self._completions.append(completion)
        return completion
