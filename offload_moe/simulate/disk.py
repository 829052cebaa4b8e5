"""The disk in virtual time: reads that share its bandwidth, demands before prefetches.

The order is that of `native/csrc/reads.c`: parts of a record concurrently, prefetches on at most half of the readers,
and a prefetch that is demanded moves behind the other demands.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from offload_moe.simulate.clock import VirtualClock
from offload_moe.simulate.costs import DiskModel

HALF_A_BYTE = 0.5


@dataclass(slots=True)
class _Read:
    """One record in flight. waiting: bytes of its parts that have not begun; num_left: parts that have not ended."""

    key: int
    ended: Callable[[], None]
    waiting: list[int]
    num_left: int


@dataclass(slots=True)
class _Part:
    read: _Read
    is_prefetch: bool
    bytes_left: float


class VirtualDisk:
    """Reads records, by key."""

    def __init__(self, clock: VirtualClock, model: DiskModel, record_bytes: int) -> None:
        self._clock = clock
        self._model = model
        self.record_bytes = record_bytes
        self._demanded: OrderedDict[int, _Read] = OrderedDict()
        self._prefetches: OrderedDict[int, _Read] = OrderedDict()
        self._flowing: list[_Part] = []
        self._num_busy = 0
        self._num_prefetching = 0
        self._settled_at = 0.0
        self._version = 0  # start of the current division of the bandwidth
        self._checked: set[int] = set()

    def read(self, key: int, ended: Callable[[], None], *, is_prefetch: bool = False) -> None:
        """Line up the read of a record. ended: called once it is read."""
        whole, rest = divmod(self.record_bytes, self._model.part_bytes)
        parts = [self._model.part_bytes] * whole + ([rest] if rest else [])
        queue = self._prefetches if is_prefetch else self._demanded
        queue[key] = _Read(key, ended, parts, len(parts))
        self._begin_what_can()

    def promote(self, key: int) -> None:
        if key in self._prefetches:
            self._demanded[key] = self._prefetches.pop(key)
            self._begin_what_can()

    def cancel(self, key: int) -> bool:
        """Cancel a prefetch of which nothing is being read. Whether it is cancelled."""
        read = self._prefetches.get(key)
        if read is None or read.num_left > len(read.waiting):
            return False
        del self._prefetches[key]
        return True

    def _begin_what_can(self) -> None:
        model = self._model
        while self._num_busy < model.num_readers:
            if self._demanded:
                queue, is_prefetch = self._demanded, False
            elif self._prefetches and self._num_prefetching < max(1, model.num_readers // 2):
                queue, is_prefetch = self._prefetches, True
            else:
                return
            key, read = next(iter(queue.items()))
            part = _Part(read, is_prefetch, read.waiting.pop())
            if not read.waiting:
                del queue[key]
            self._num_busy += 1
            self._num_prefetching += is_prefetch
            self._clock.after(model.latency_s, partial(self._flow, part))

    def _flow(self, part: _Part) -> None:
        self._settle()
        self._flowing.append(part)
        self._divide()

    def _rate(self) -> float:
        return min(self._model.stream_bytes_per_s, self._model.bytes_per_s / len(self._flowing))

    def _settle(self) -> None:
        """Account for the bytes that were read since the bandwidth was last divided."""
        if self._flowing:
            done = self._rate() * (self._clock.now - self._settled_at)
            for part in self._flowing:
                part.bytes_left -= done
        self._settled_at = self._clock.now

    def _divide(self) -> None:
        """Divide the bandwidth evenly among the reads in flight, and schedule the end of the first."""
        self._version += 1
        if self._flowing:
            soonest = max(0.0, min(part.bytes_left for part in self._flowing)) / self._rate()
            self._clock.after(soonest, partial(self._end_some, self._version))

    def _end_some(self, version: int) -> None:
        if version != self._version:
            return
        self._settle()
        ended = [part for part in self._flowing if part.bytes_left < HALF_A_BYTE]
        self._flowing = [part for part in self._flowing if part.bytes_left >= HALF_A_BYTE]
        self._divide()
        for part in ended:
            part.read.num_left -= 1
            is_first_read = part.read.num_left == 0 and part.read.key not in self._checked
            check_s = self.record_bytes / self._model.check_bytes_per_s if is_first_read else 0.0
            self._clock.after(check_s, partial(self._end, part))

    def _end(self, part: _Part) -> None:
        self._num_busy -= 1
        self._num_prefetching -= part.is_prefetch
        read = part.read
        if read.num_left == 0:
            read.num_left = -1  # several parts may end at the same time, but the record arrives once
            self._checked.add(read.key)
            read.ended()
        self._begin_what_can()
