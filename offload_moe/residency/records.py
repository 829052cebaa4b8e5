"""The RAM tier as a source of copies to the device tier."""

from functools import partial

from offload_moe.memory.arena import Arena
from offload_moe.memory.device import Borrowed
from offload_moe.residency.scheduler import Scheduler


class RamRecords:
    """Leases one record at a time; another thread may give it back."""

    def __init__(self, ram: Scheduler, arena: Arena) -> None:
        self._ram = ram
        self._arena = arena

    def borrow(self, key: int) -> Borrowed:
        """Lease a record, which is read from disk if it is not resident. Raises: TransferError."""
        layer, expert = self._ram.keys.layer_expert(key)
        lease = self._ram.acquire(layer, [expert])
        try:
            ((_, slot),) = next(iter(lease))
        except BaseException:
            lease.close()
            raise
        return self._arena.slot(slot), lease.close

    def borrow_resident(self, key: int) -> Borrowed | None:
        """Lease a record that is resident; None where it would have to be read, or waited for."""
        layer, expert = self._ram.keys.layer_expert(key)
        slots = self._ram.hold(layer, [expert])
        return None if slots is None else (self._arena.slot(slots[0]), partial(self._ram.release_held, slots))
