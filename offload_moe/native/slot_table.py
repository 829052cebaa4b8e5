"""The table of experts and slots of a pool: one state machine for Python, readers and token passes."""

from array import array
from collections.abc import Sequence

from offload_moe.native.bindings import library
from offload_moe.native.constants import FREE, RESERVED
from offload_moe.native.library import load_for_short_calls
from offload_moe.system.lifecycle import finalize

_RECORD_UNIT = 4096  # of addresses that stand for records where there is no memory


class SlotTable:
    """The slot table of one pool; its states are those of `csrc/slot_table.h`. Safe to use from several threads.

    Python reads the arrays that native threads change without a call. Python's own leases are not in the table.
    """

    def __init__(self, num_keys: int, num_slots: int, addresses: Sequence[int] | None = None) -> None:
        """addresses: of the slots' records; may grow. None for a table without memory, with which no pass computes.

        Raises: MemoryError.
        """
        self.num_keys = num_keys
        self._addresses = addresses
        self._records, self._leases = array("Q", bytes(8 * num_keys)), array("i", bytes(4 * num_keys))
        self.slots = array("i", [-1]) * num_keys  # by key: its slot, -1 absent
        self.keys, self.states = array("q"), array("B")  # by slot: its expert, -1 none; and its state
        self.memory = [self._records, self._leases, self.slots, self.keys, self.states]  # kept alive by its users
        self._num_holds = 0
        native, short = library(), load_for_short_calls()
        self._admit, self._loaded, self._vacate = (
            short.om_slot_table_admit,
            short.om_slot_table_loaded,
            short.om_slot_table_vacate,
        )
        self._resize = short.om_slot_table_resize
        arrays = (self._records, self._leases, self.slots)
        self.handle = native.om_slot_table_open(*(each.buffer_info()[0] for each in arrays))
        if not self.handle:
            raise MemoryError("No memory for the table of slots.")
        finalize(self, native.om_slot_table_close, self.handle).atexit = False  # passes of daemon threads may use it
        self.resize(num_slots)

    @property
    def num_slots(self) -> int:
        """Slots of the pool."""
        return len(self.states)

    def resize(self, num_slots: int) -> None:
        """Append FREE slots, or give up the last ones, which must be FREE."""
        keys, states = array("q", bytes(8 * num_slots)), array("B", bytes(num_slots))
        self._resize(self.handle, keys.buffer_info()[0], states.buffer_info()[0], num_slots)
        self.keys, self.states = keys, states
        self.memory[-2:] = [keys, states]

    def address(self, slot: int) -> int:
        """The address of the slot's record."""
        return _RECORD_UNIT * (slot + 1) if self._addresses is None else self._addresses[slot]

    def admit(self, key: int, slot: int) -> bool:
        """Change a FREE or RESERVED slot to LOADING; False, and no change, if the expert has a slot already."""
        return bool(self._admit(self.handle, key, slot))

    def loaded(self, slot: int) -> None:
        """Change a LOADING or ARRIVED slot to RESIDENT."""
        self._loaded(self.handle, slot, self.address(slot))

    def vacate(self, slot: int) -> bool:
        """Change a slot to FREE; False, and no change, while a token pass computes with its expert."""
        return bool(self._vacate(self.handle, slot, FREE))

    def reserve(self, slot: int) -> None:
        """Change a FREE slot, or one whose reserved read was dropped, to RESERVED."""
        self._vacate(self.handle, slot, RESERVED)

    def arrive(self, slot: int) -> None:
        """Change a LOADING slot to ARRIVED, for readers without native threads."""
        assert self.keys[slot] >= 0, f"no expert is loading into slot {slot}"
        library().om_slot_table_arrived(self.handle, slot, self.address(slot))

    def is_leased(self, key: int) -> bool:
        """Whether a token pass leases the expert, or all experts are held."""
        return self._num_holds > 0 or self._leases[key] > 0

    def lease_arrived(self, keys: Sequence[int]) -> list[int]:
        """Lease those of the experts that have arrived, as a token pass does, and return them."""
        experts, is_here = array("q", keys), array("B", bytes(len(keys)))
        library().om_slot_table_lease(self.handle, experts.buffer_info()[0], len(experts), is_here.buffer_info()[0])
        return [key for key, here in zip(keys, is_here, strict=True) if here]

    def release(self, keys: Sequence[int]) -> None:
        """End a lease of a token pass on each of the experts."""
        ended = array("q", keys)
        library().om_slot_table_release(self.handle, ended.buffer_info()[0], len(ended))

    def hold_all(self) -> None:
        """Count every expert as leased until `release_all_holds` (under the lock that guards evictions)."""
        self._num_holds += 1

    def release_all_holds(self) -> None:
        """End one `hold_all`."""
        self._num_holds -= 1
