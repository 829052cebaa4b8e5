"""Threads for transfers: demanded ones first, prefetches when nothing is demanded."""

import atexit
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Job = Callable[[], None]
CLOSE_LIMIT_S = 5.0  # a thread that is stuck in a dead disk must not keep the process from ending


@dataclass(slots=True)
class _Transfer:
    """One slot's parts that have not begun, and how many are under way."""

    parts: deque[Job]
    num_running: int = 0


class TransferWorkers:
    """Runs the parts of one transfer per slot, in order, on several threads.

    A demand overtakes prefetches between their parts, also those that have begun; a prefetch whose expert is demanded
    becomes a demand. Prefetches never take all threads: a demand must not wait for something nobody asked for.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._max_prefetches = max(1, num_threads // 2)
        self._demanded: OrderedDict[int, _Transfer] = OrderedDict()
        self._prefetches: OrderedDict[int, _Transfer] = OrderedDict()
        self._num_prefetching = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # a daemon thread that the interpreter stops inside torch takes the process with it

    def submit(self, slot: int, parts: Sequence[Job], *, is_prefetch: bool) -> None:
        """Line up a transfer; its parts may run at the same time."""
        with self._changed:
            (self._prefetches if is_prefetch else self._demanded)[slot] = _Transfer(deque(parts))
            self._changed.notify(len(parts))

    def hurry(self, slot: int) -> None:
        """The slot's expert is demanded now."""
        with self._changed:
            if slot in self._prefetches:
                self._demanded[slot] = self._prefetches.pop(slot)
                self._changed.notify_all()

    def cancel(self, slot: int) -> bool:
        """Forget a prefetch unless one of its parts is running. Whether it is forgotten: then nobody writes there."""
        with self._changed:
            transfer = self._prefetches.get(slot)
            if transfer is None or transfer.num_running:
                return False
            del self._prefetches[slot]
            return True

    def close(self) -> bool:
        """Drop what is waiting, finish what is running. False when a thread is still stuck in its job."""
        atexit.unregister(self.close)
        with self._changed:
            self._is_closed = True
            self._demanded.clear()
            self._prefetches.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + CLOSE_LIMIT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and not self._demanded and not self._may_prefetch():
                    self._changed.wait()
                if self._is_closed:
                    return
                is_prefetch = not self._demanded
                transfer, part = self._take(self._prefetches if is_prefetch else self._demanded)
                self._num_prefetching += is_prefetch
            part()
            with self._changed:
                transfer.num_running -= 1
                if is_prefetch:
                    self._num_prefetching -= 1
                    self._changed.notify()

    @staticmethod
    def _take(queue: OrderedDict[int, _Transfer]) -> tuple[_Transfer, Job]:
        slot, transfer = next(iter(queue.items()))
        transfer.num_running += 1
        part = transfer.parts.popleft()
        if not transfer.parts:
            del queue[slot]
        return transfer, part

    def _may_prefetch(self) -> bool:
        return bool(self._prefetches) and self._num_prefetching < self._max_prefetches
