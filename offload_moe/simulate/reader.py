"""Slot table and reader in virtual time: the counterparts of `csrc/slot_table.c` and `csrc/reads.c`."""

from collections import Counter
from collections.abc import Collection, Iterable
from functools import partial

from offload_moe.memory.transfers import Transfers
from offload_moe.native.kernels import DONE, DROPPED, READING, Completion
from offload_moe.simulate.clock import VirtualCondition
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


class VirtualReader:
    """A `memory.reader.Reader` on a virtual disk, into which token passes fetch, too."""

    def __init__(self, slot_table: VirtualSlotTable, disk: VirtualDisk, changed: VirtualCondition) -> None:
        """changed: of the tier that is filled."""
        self._slot_table = slot_table
        self._disk = disk
        self._spares: list[int] = []
        self._least_spares = 0
        self._guesses: dict[int, int] = {}  # of token passes: key -> slot
        self._completions: list[Completion] = []
        self._changed = changed
        self.transfers = Transfers(self, changed)

    @property
    def num_completions(self) -> int:
        return len(self._completions)

    def completions(self) -> list[Completion]:
        completions, self._completions = self._completions, []
        return completions

    def submit(self, key: int, slot: int, *, is_prefetch: bool = False) -> None:
        self._disk.read(key, partial(self._ended, key, slot, is_prefetch, is_of_pass=False), is_prefetch=is_prefetch)

    def demand(self, key: int) -> None:
        self._guesses.pop(key, None)
        self._disk.promote(key)

    def cancel(self, key: int) -> bool:
        return self._disk.cancel(key)

    def num_bytes(self, key: int) -> int:
        return self._disk.record_bytes

    def reserve(self, slot: int) -> None:
        self._spares.append(slot)

    def ask_below(self, least_slots: int) -> None:
        self._least_spares = least_slots

    def reclaim(self) -> list[int]:
        slots, self._spares = self._spares[::-1], []
        return slots

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
        if is_prefetch:
            self._guesses[key] = slot
        self._completions.append(Completion(key, slot, READING, is_prefetch))
        self._disk.read(key, partial(self._ended, key, slot, is_prefetch, is_of_pass=True), is_prefetch=is_prefetch)
        return True

    def drop_wrong(self, end: int, wanted: Collection[int]) -> None:
        """Drop unused predictions for layers before that key, unless their reads have begun."""
        for key, slot in list(self._guesses.items()):
            if key < end and key not in wanted and self._disk.cancel(key):
                del self._guesses[key]
                self._slot_table.withdraw(key)
                self._spares.append(slot)
                self._completions.append(Completion(key, slot, DROPPED, was_prefetch=True))

    def _ended(self, key: int, slot: int, was_prefetch: bool, *, is_of_pass: bool) -> None:
        """Python drains its own reads as they end, those of a token pass when it looks, or waits."""
        self._guesses.pop(key, None)
        self._slot_table.publish(key, slot)
        self._completions.append(Completion(key, slot, DONE, was_prefetch))
        if is_of_pass:
            self._changed.notify_all()
        else:
            self.transfers.drain()
