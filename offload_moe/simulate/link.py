"""The link to the device in virtual time: loaders that lease records in the RAM tier, copies one after another."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from offload_moe.memory.mover import Arrived
from offload_moe.residency.lease import Lease
from offload_moe.residency.scheduler import Scheduler
from offload_moe.simulate.clock import VirtualClock, VirtualCondition
from offload_moe.simulate.costs import LinkModel
from offload_moe.simulate.processor import Processor


@dataclass(slots=True)
class _Copy:
    key: int
    slot: int
    arrived: Arrived
    is_prefetch: bool = False
    lease: Lease | None = None


class VirtualLink:
    """A mover: the virtual counterpart of `offload_moe.memory.device.DeviceMover`."""

    def __init__(
        self, clock: VirtualClock, model: LinkModel, ram: Scheduler, processor: Processor, record_bytes: int
    ) -> None:
        """ram: the tier in which records are leased; its `changed` is a `VirtualCondition`."""
        self._clock = clock
        self._model = model
        self._ram = ram
        self._processor = processor
        self._record_bytes = record_bytes
        self._demanded: OrderedDict[int, _Copy] = OrderedDict()
        self._prefetches: OrderedDict[int, _Copy] = OrderedDict()
        self._borrowing: list[_Copy] = []
        self._num_busy = 0
        self._num_prefetching = 0
        self._free_at = 0.0
        self._read_until: dict[int, float] = {}  # slot -> end of the compute that reads it
        assert isinstance(ram.changed, VirtualCondition)
        ram.changed.listeners.append(self._issue_what_can)

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        (self._prefetches if is_prefetch else self._demanded)[slot] = _Copy(key, slot, arrived)
        self._begin_what_can()

    def promote(self, slot: int) -> None:
        if slot in self._prefetches:
            self._demanded[slot] = self._prefetches.pop(slot)
            self._begin_what_can()

    def cancel(self, slot: int) -> bool:
        return self._prefetches.pop(slot, None) is not None

    def drain(self) -> None:
        pass

    def used(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._read_until[slot] = self._processor.done_at

    def close(self) -> None:
        pass

    def _begin_what_can(self) -> None:
        most_prefetches = max(1, self._model.num_loaders // 2)
        while self._num_busy < self._model.num_loaders:
            if self._demanded:
                _, copy = self._demanded.popitem(last=False)
            elif self._prefetches and self._num_prefetching < most_prefetches:
                _, copy = self._prefetches.popitem(last=False)
                copy.is_prefetch = True
            else:
                break
            self._num_busy += 1
            self._num_prefetching += copy.is_prefetch
            layer, expert = self._ram.keys.layer_expert(copy.key)
            copy.lease = self._ram.acquire(layer, [expert])
            self._borrowing.append(copy)
        self._issue_what_can()

    def _issue_what_can(self) -> None:
        waiting, self._borrowing = self._borrowing, []
        for copy in waiting:
            assert copy.lease is not None
            if copy.lease.poll():
                starts = max(self._clock.now, self._free_at, self._read_until.get(copy.slot, 0.0))
                self._free_at = starts + self._record_bytes / self._model.bytes_per_s
                self._clock.at(self._free_at + self._model.latency_s, partial(self._end, copy))
            else:
                self._borrowing.append(copy)

    def _end(self, copy: _Copy) -> None:
        assert copy.lease is not None
        copy.lease.__exit__(None, None, None)
        self._num_busy -= 1
        self._num_prefetching -= copy.is_prefetch
        copy.arrived(copy.slot, self._record_bytes, None)
        self._begin_what_can()
