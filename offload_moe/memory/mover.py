"""The interface of the mover of a tier, which the scheduler calls."""

from collections.abc import Callable, Sequence
from typing import Protocol

Arrived = Callable[[int, int, BaseException | None], None]


class Mover(Protocol):
    """Brings the record of an expert into a slot of this tier."""

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        """Begin the transfer; a prefetch is lined up behind the demanded ones.

        Calls ``arrived(slot, num_bytes, error)`` once, from a thread of the mover or from one that drains.
        """

    def promote(self, slot: int) -> None:
        """Treat the prefetch into the slot as a demand from now on."""

    def cancel(self, slot: int) -> bool:
        """Cancel the prefetch into the slot, if nothing of it is under way.

        Returns whether it is cancelled: then `arrived` is not called.
        """

    def drain(self) -> None:
        """Call `arrived` for transfers that have ended, where the mover leaves that to its callers (lock held)."""

    def used(self, slots: Sequence[int]) -> None:
        """Keep the slots from being overwritten until compute that the calling thread has issued on them is done."""

    def close(self) -> None:
        """Stop the threads; transfers under way are finished or dropped."""
