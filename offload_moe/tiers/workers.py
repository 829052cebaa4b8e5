"""Threads for transfers: demanded ones first, prefetches when nothing is demanded."""

import threading
from collections import OrderedDict
from collections.abc import Callable

Job = Callable[[], None]


class TransferWorkers:
    """Runs one job per slot. A prefetch that is still waiting when its expert is demanded jumps the queue.

    Prefetches never take all threads: a demand must not wait for the read of something nobody asked for.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._max_prefetches = max(1, num_threads // 2)
        self._demanded: OrderedDict[int, Job] = OrderedDict()
        self._prefetches: OrderedDict[int, Job] = OrderedDict()
        self._num_prefetching = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, slot: int, job: Job, *, is_prefetch: bool) -> None:
        with self._changed:
            (self._prefetches if is_prefetch else self._demanded)[slot] = job
            self._changed.notify()

    def hurry(self, slot: int) -> None:
        """The slot's expert is demanded now; nothing happens when its transfer has begun already."""
        with self._changed:
            if slot in self._prefetches:
                self._demanded[slot] = self._prefetches.pop(slot)
                self._changed.notify()

    def close(self) -> None:
        """Drop what is waiting, finish what is running."""
        with self._changed:
            self._is_closed = True
            self._demanded.clear()
            self._prefetches.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and not self._demanded and not self._may_prefetch():
                    self._changed.wait()
                if self._is_closed:
                    return
                is_prefetch = not self._demanded
                _, job = (self._prefetches if is_prefetch else self._demanded).popitem(last=False)
                self._num_prefetching += is_prefetch
            job()
            if is_prefetch:
                with self._changed:
                    self._num_prefetching -= 1
                    self._changed.notify()

    def _may_prefetch(self) -> bool:
        return bool(self._prefetches) and self._num_prefetching < self._max_prefetches
