"""Threads for copies to the device that wait for a read or a buffer first: demanded ones, then prefetches."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from offload_moe.system.lifecycle import finalize

Job = Callable[[], None]
CLOSE_LIMIT_S = 5.0  # a thread that is stuck in a read must not keep the process from ending


class TransferWorkers:
    """Runs one job per slot, on several threads.

    A demand overtakes prefetches; a prefetch whose expert is demanded becomes a demand. Prefetches never take all
    threads: a demand must not wait for a guess.

    The threads end once this is dropped: they refer only to its queue.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._queue = queue = _Queue(max(1, num_threads // 2))
        threads: list[threading.Thread] = []
        self._close = finalize(self, _close, queue, threads)  # also at exit, before threads are stopped inside of torch
        for index in range(num_threads):
            thread = threading.Thread(target=queue.work, name=f"{name}-{index}", daemon=True)
            thread.start()
            threads.append(thread)

    def submit(self, slot: int, job: Job, *, is_prefetch: bool) -> None:
        """Queue a transfer."""
        self._queue.submit(slot, job, is_prefetch=is_prefetch)

    def promote(self, slot: int) -> None:
        """Treat the prefetch into the slot as a demand from now on."""
        self._queue.promote(slot)

    def cancel(self, slot: int) -> bool:
        """Cancel a prefetch unless it is running. Returns whether: then no thread writes to the slot."""
        return self._queue.cancel(slot)

    def close(self) -> bool:
        """Drop the jobs that wait, finish those that run. Returns False when a thread is still stuck in its job."""
        return self._close() is not False


def _close(queue: "_Queue", threads: Sequence[threading.Thread]) -> bool:
    queue.close()
    if threading.current_thread() in threads:  # a collection of garbage ran here, perhaps with the queue's lock held
        return False
    deadline = time.monotonic() + CLOSE_LIMIT_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


class _Queue:
    """The state that the threads share."""

    def __init__(self, max_prefetches: int) -> None:
        self._max_prefetches = max_prefetches
        self._demanded: OrderedDict[int, Job] = OrderedDict()
        self._prefetches: OrderedDict[int, Job] = OrderedDict()
        self._num_prefetching = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def submit(self, slot: int, job: Job, *, is_prefetch: bool) -> None:
        with self._changed:
            (self._prefetches if is_prefetch else self._demanded)[slot] = job
            self._changed.notify()

    def promote(self, slot: int) -> None:
        with self._changed:
            if slot in self._prefetches:
                self._demanded[slot] = self._prefetches.pop(slot)
                self._changed.notify_all()

    def cancel(self, slot: int) -> bool:
        with self._changed:
            return self._prefetches.pop(slot, None) is not None

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._demanded.clear()
            self._prefetches.clear()
            self._changed.notify_all()

    def work(self) -> None:
        """Run jobs until closed; the body of each thread."""
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Run one job, of which nothing is kept afterwards. Returns False once closed."""
        with self._changed:
            while not self._is_closed and not self._demanded and not self._may_prefetch():
                self._changed.wait()
            if self._is_closed:
                return False
            is_prefetch = not self._demanded
            _, job = (self._prefetches if is_prefetch else self._demanded).popitem(last=False)
            self._num_prefetching += is_prefetch
        job()
        if is_prefetch:
            with self._changed:
                self._num_prefetching -= 1
                self._changed.notify()
        return True

    def _may_prefetch(self) -> bool:
        return bool(self._prefetches) and self._num_prefetching < self._max_prefetches
