"""The RAM tier as the device tier sees it: records to copy from."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

from offload_moe.schedule.scheduler import Scheduler
from offload_moe.tiers.arena import Arena


class RamRecords:
    """Leases one record at a time; what was borrowed may be given back by another thread."""

    def __init__(self, ram: Scheduler, arena: Arena) -> None:
        self._ram = ram
        self._arena = arena

    @contextmanager
    def borrow(self, key: int) -> Iterator[Tensor]:
        """Read it from disk if need be. Raises: TransferError, when the context is entered."""
        layer, expert = divmod(key, self._ram.num_experts)
        with self._ram.acquire(layer, [expert]) as lease:
            for ((_, slot),) in lease:
                yield self._arena.slot(slot)

    def borrow_resident(self, key: int) -> AbstractContextManager[Tensor] | None:
        """None where it would have to be read, or waited for. The context has to be entered."""
        layer, expert = divmod(key, self._ram.num_experts)
        slots = self._ram.hold(layer, [expert])
        return self._held(slots) if slots is not None else None

    @contextmanager
    def _held(self, slots: list[int]) -> Iterator[Tensor]:
        try:
            yield self._arena.slot(slots[0])
        finally:
            self._ram.let_go(slots)
