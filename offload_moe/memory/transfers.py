"""The transfers of a tier that a reader fills: what was submitted, and what its completions report.

Completions are entered in their order, under the lock of the tier: by the next thread that drains, or by the attending
thread while no other drains.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from offload_moe.errors import TransferError
from offload_moe.memory.mover import Arrived
from offload_moe.memory.reader import Reader
from offload_moe.native.kernels import DONE, DROPPED, READING, Completion


class PassReads(Protocol):
    """Accounts for the reads of token passes, into slots that were reserved for them (lock held)."""

    def began(self, key: int, slot: int, was_prefetch: bool) -> Arrived:
        """Enter that a reserved slot is being filled. Returns what to call at the read's end (`Mover.start`)."""

    def dropped(self, key: int, slot: int, was_prefetch: bool) -> None:
        """Enter that a guess is not read any further: its slot is reserved and empty."""


@dataclass(slots=True)
class Reading:
    """A record on its way. num_failures: of the attempts so far."""

    key: int
    slot: int
    arrived: Arrived
    is_prefetch: bool = False
    num_failures: int = 0


class Transfers:
    """A mover over a reader. A subclass may read again what has failed."""

    def __init__(self, reader: Reader, changed: threading.Condition) -> None:
        """changed: the condition of the tier."""
        self.reader = reader
        self.changed = changed
        self._pass_reads: PassReads | None = None
        self._readings: dict[int, Reading] = {}  # by slot

    def account_to(self, pass_reads: PassReads) -> None:
        """Account for the reads of token passes to `pass_reads` from now on."""
        self._pass_reads = pass_reads

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        """See `Mover.start`. arrived: called with the lock held."""
        with self.changed:
            self._readings[slot] = reading = Reading(key, slot, arrived, is_prefetch)
            self.submit(reading)

    def submit(self, reading: Reading) -> None:
        """Submit the read to the reader (lock held)."""
        self.reader.submit(reading.key, reading.slot, is_prefetch=reading.is_prefetch)

    def promote(self, slot: int) -> None:
        with self.changed:
            reading = self._readings.get(slot)
            if reading is not None:
                reading.is_prefetch = False
                self.reader.demand(reading.key)

    def cancel(self, slot: int) -> bool:
        with self.changed:
            reading = self._readings.get(slot)
            if reading is None or not self.reader.cancel(reading.key):
                return False
            del self._readings[slot]
            return True

    def used(self, slots: Sequence[int]) -> None:
        """Do nothing: compute on the CPU is finished when it returns."""

    def close(self) -> None:
        """Do nothing: reads that still run are not entered any more."""

    def drain(self) -> None:
        """Enter the completions since the last call."""
        if self.reader.num_completions:
            with self.changed:
                for completion in self.reader.completions():
                    self._enter(completion)

    def has_failed(self, reading: Reading, completion: Completion) -> None:
        """Handle a read that has failed (lock held): give it up."""
        self.give_up(reading, TransferError(f"Reading expert record {reading.key} failed ({completion.error})."))

    def give_up(self, reading: Reading, error: Exception) -> None:
        """End a transfer whose record will not arrive (lock held)."""
        del self._readings[reading.slot]
        reading.arrived(reading.slot, 0, error)

    def _enter(self, completion: Completion) -> None:
        key, slot, was_prefetch = completion.key, completion.slot, completion.was_prefetch
        if completion.state == READING:
            assert self._pass_reads is not None
            self._readings[slot] = Reading(key, slot, self._pass_reads.began(key, slot, was_prefetch))
        elif completion.state == DROPPED:
            assert self._pass_reads is not None
            del self._readings[slot]
            self._pass_reads.dropped(key, slot, was_prefetch)
        elif completion.state == DONE:
            self._readings.pop(slot).arrived(slot, self.reader.num_bytes(key), None)
        else:
            self.has_failed(self._readings[slot], completion)
