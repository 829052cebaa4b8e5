"""A reader in virtual time: the counterpart of `csrc/reads.c`."""

from collections.abc import Collection
from functools import partial

from offload_moe.memory.transfers import Transfers
from offload_moe.native.kernels import DONE, DROPPED, READING, Completion, SlotTable
from offload_moe.simulate.clock import VirtualCondition
from offload_moe.simulate.disk import VirtualDisk


class VirtualReader:
    """A `memory.reader.Reader` on a virtual disk, into which token passes fetch, too."""

    def __init__(self, slot_table: SlotTable, disk: VirtualDisk, changed: VirtualCondition) -> None:
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

    def need_below(self, least_slots: int) -> None:
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
        self._slot_table.admit(key, slot)
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
                self._slot_table.reserve(slot)
                self._spares.append(slot)
                self._completions.append(Completion(key, slot, DROPPED, was_prefetch=True))

    def _ended(self, key: int, slot: int, was_prefetch: bool, *, is_of_pass: bool) -> None:
        """Python drains its own reads as they end, those of a token pass when it looks, or waits."""
        self._guesses.pop(key, None)
        self._slot_table.arrive(slot)
        self._completions.append(Completion(key, slot, DONE, was_prefetch))
        if is_of_pass:
            self._changed.notify_all()
        else:
            self.transfers.drain()
