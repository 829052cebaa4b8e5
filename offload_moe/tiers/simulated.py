"""A simulated accelerator: a real thread, memory of its own, a bandwidth and a latency.

A copy reads its source when it *completes*, not when it is issued: whoever forgets to wait, or lets go of the source
too early, computes with wrong bytes. Overlap with compute is real, because the thread really sleeps.
"""

import queue
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from offload_moe.tiers.copier import Marker

POISON = 0xA5  # fresh device memory is not zero


class SimulatedMarker:
    def __init__(self) -> None:
        self._done = threading.Event()

    def wait(self) -> None:
        self._done.wait()

    def finish(self) -> None:
        self._done.set()


class SimulatedCopier:
    """Copies one after another, as one link does. Compute happens on the calling thread and is done when it returns."""

    def __init__(
        self,
        bytes_per_s: float = 25e9,
        latency_s: float = 10e-6,
        delay_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """delay_s: extra seconds before each copy completes, for tests with adversarial timing."""
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._delay_s = delay_s
        self._queue: queue.SimpleQueue[tuple[Tensor, Tensor, Marker | None, SimulatedMarker] | None]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="simulated-link", daemon=True)
        self._thread.start()

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), POISON, dtype=torch.uint8)

    def copy(self, source: Tensor, destination: Tensor, after: Marker | None) -> Marker:
        marker = SimulatedMarker()
        self._queue.put((source, destination, after, marker))
        return marker

    def mark(self) -> Marker:
        marker = SimulatedMarker()
        marker.finish()
        return marker

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            source, destination, after, marker = job
            if after is not None:
                after.wait()
            destination.fill_(POISON)
            time.sleep(self._latency_s + source.numel() / self._bytes_per_s + self._delay_s())
            destination.copy_(source)
            marker.finish()
