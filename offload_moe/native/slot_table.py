"""The table in which native runs find resident experts and lease them by themselves."""

from array import array
from collections.abc import Sequence

from offload_moe.native.bindings import library
from offload_moe.system.lifecycle import finalize


class SlotTable:
    """One per pool; see `schedule.residency.Lookup`. Safe to use from several threads."""

    def __init__(self, num_keys: int, addresses: Sequence[int]) -> None:
        """addresses: of the slots' records, live."""
        self.num_keys = num_keys
        self._addresses = addresses
        self._records, self._leases = array("Q", bytes(8 * num_keys)), array("i", bytes(4 * num_keys))
        self.memory = (self._records, self._leases)  # what those who use the table keep
        self._num_holds = 0
        native = library()
        self._claim, self._publish = native.om_slot_table_claim, native.om_slot_table_publish
        self._withdraw = native.om_slot_table_withdraw
        self.handle = native.om_slot_table_open(self._records.buffer_info()[0], self._leases.buffer_info()[0])
        if not self.handle:
            raise MemoryError("No memory for the table of resident experts.")
        finalize(self, native.om_slot_table_close, self.handle).atexit = False  # runs of daemon threads may use it

    def address(self, slot: int) -> int:
        return self._addresses[slot]

    def claim(self, key: int) -> bool:
        return bool(self._claim(self.handle, key))

    def publish(self, key: int, slot: int) -> None:
        self._publish(self.handle, key, self._addresses[slot])

    def withdraw(self, key: int) -> bool:
        return not self._num_holds and bool(self._withdraw(self.handle, key))

    def is_leased(self, key: int) -> bool:
        return self._num_holds > 0 or self._leases[key] > 0

    def hold_all(self) -> None:
        """Nothing is withdrawn until `release_all_holds`. Under the lock that whoever withdraws holds."""
        self._num_holds += 1

    def release_all_holds(self) -> None:
        self._num_holds -= 1
