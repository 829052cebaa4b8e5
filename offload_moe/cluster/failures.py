"""When a cluster without a replica gives up: an error of ours stays one, any other may pass, but not for ever."""

from collections.abc import Set

from offload_moe.cluster.slots import Slot
from offload_moe.errors import OffloadMoeError

MOST_TRIES = 3  # in a slot, of what fails with another error than ours: no memory, a library missing, a worker killed


class Failures:
    """Of every slot, until the first replica is there."""

    def __init__(self) -> None:
        self._numbers: dict[Slot, int] = {}
        self._final: dict[Slot, OffloadMoeError] = {}

    def note(self, slot: Slot, error: BaseException, slots: Set[Slot]) -> OffloadMoeError | None:
        """Count a failure. Returns the error to end with, once none of the slots is worth another try."""
        number = self._numbers[slot] = self._numbers.get(slot, 0) + 1
        if isinstance(error, OffloadMoeError):
            self._final[slot] = error
        elif number >= MOST_TRIES:
            self._final[slot] = OffloadMoeError(
                f"No replica starts at {slot.address}: {number} attempts failed, the last one with {named(error)}. Run "
                "`offload-moe run` with the same model and flags on that machine, which shows the error alone."
            )
        return self._final.get(slot) if self._final.keys() >= slots else None

    def forget(self, slot: Slot) -> None:
        """It is gone, and may come back."""
        self._numbers.pop(slot, None)
        self._final.pop(slot, None)


def named(error: BaseException) -> str:
    """Its first line; of another error than ours after its class."""
    line = first_line(error)
    if isinstance(error, OffloadMoeError):
        return line
    return f"{type(error).__name__}: {line.rstrip('.')}" if line else type(error).__name__


def first_line(error: object) -> str:
    """Ray's errors go on for many."""
    return str(error).partition("\n")[0]
