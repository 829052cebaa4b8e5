"""A simulated accelerator: streams that are real threads, memory of its own, a bandwidth and a latency.

It runs the code of `StreamCopier`; only streams, events and the copy itself are simulated. A copy reads its source when
it *completes*, not when it is issued: a missing wait, or a source that is released too early, gives wrong bytes.
Overlap with compute is real, because the thread sleeps.

A lazy stream does nothing until a thread waits for it: the worst timing that a real device may show, every time.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from offload_moe.memory.copier import DeviceMemory, Marker, StreamCopier
from offload_moe.memory.page_lock import LockRuntime, PageLock

POISON = 0xA5  # fresh device memory is not zero

_current = threading.local()


class SimulatedStream:
    """Runs what is issued to it, in order, on a thread of its own."""

    def __init__(self, *, is_lazy: bool = False) -> None:
        self.num_issued = 0
        self._num_done = 0
        self._demanded = 0
        self._is_lazy = is_lazy
        self._jobs: deque[Callable[[], None] | None] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="simulated-stream", daemon=True)
        self._thread.start()

    @property
    def stream_id(self) -> int:
        return id(self)

    def issue(self, job: Callable[[], None]) -> None:
        """Queue a job."""
        with self._changed:
            self._jobs.append(job)
            self.num_issued += 1
            self._changed.notify_all()

    def wait_event(self, event: "SimulatedEvent") -> None:
        """Order what is issued from now on after the event's point."""
        self.issue(event.as_recorded())

    def wait_for(self, position: int, limit_s: float | None = None) -> None:
        """Block the calling thread until the first `position` jobs are done. Raises: TimeoutError."""
        with self._changed:
            self._demanded = max(self._demanded, position)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._num_done >= position, limit_s):
                raise TimeoutError

    def synchronize(self) -> None:
        self.wait_for(self.num_issued)

    def close(self) -> None:
        """Finish what was issued and end the thread."""
        with self._changed:
            self._demanded = self.num_issued
            self._jobs.append(None)
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "SimulatedStream":
        stack = _current.__dict__.setdefault("streams", [])
        stack.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.streams.pop()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._may_run)
                job = self._jobs.popleft()
            if job is None:
                return
            job()
            with self._changed:
                self._num_done += 1
                self._changed.notify_all()

    def _may_run(self) -> bool:
        return bool(self._jobs) and (not self._is_lazy or self._num_done < self._demanded or self._jobs[0] is None)


class SimulatedEvent:
    """The number of jobs that a stream had received when the event was recorded."""

    def __init__(self) -> None:
        self._stream: SimulatedStream | None = None
        self._position = 0

    def record(self, stream: SimulatedStream) -> None:
        self._stream, self._position = stream, stream.num_issued

    def synchronize(self, limit_s: float | None = None) -> None:
        self.as_recorded(limit_s)()

    def as_recorded(self, limit_s: float | None = None) -> Callable[[], None]:
        """A function that waits for the point as it is now, whatever is recorded later. It raises TimeoutError."""
        stream, position = self._stream, self._position
        return lambda: stream.wait_for(position, limit_s) if stream is not None else None


class SimulatedCopier(StreamCopier):
    """Copies one after another, as one link does.

    Compute that runs on the calling thread is done when it returns, so that thread has to wait for copies itself. With
    `defers_compute` it is issued to the current stream instead, and runs in that stream's order.
    """

    def __init__(
        self,
        bytes_per_s: float = 25e9,
        latency_s: float = 10e-6,
        delay_s: Callable[[], float] = lambda: 0.0,
        *,
        lazy_copies: bool = False,
        lazy_compute: bool = False,
        defers_compute: bool = False,
        page_lock: PageLock | None = None,
        capacity: Callable[[], int] = lambda: 1 << 50,
    ) -> None:
        """delay_s: extra seconds before each copy completes, for tests with adversarial timing.

        capacity: bytes that `allocate` gives in all at present.
        """
        self._capacity, self.num_allocated = capacity, 0
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._delay_s = delay_s
        self._lazy_copies = lazy_copies
        self._defers_compute = defers_compute
        self.compute = SimulatedStream(is_lazy=lazy_compute)
        super().__init__(page_lock or PageLock(EveryLock()))

    def follow(self, copied: Marker, limit_s: float) -> bool:
        if self._defers_compute:
            return super().follow(copied, limit_s)
        assert isinstance(copied.event, SimulatedEvent)
        copied.event.synchronize(limit_s)
        return True

    def allocate(self, num_bytes: int) -> Tensor:
        if self.num_allocated + num_bytes > self._capacity():
            raise torch.OutOfMemoryError(f"The simulated device has no {num_bytes} bytes left.")
        self.num_allocated += num_bytes
        with torch.inference_mode(False):
            return torch.full((num_bytes,), POISON, dtype=torch.uint8)

    def free(self, memory: Tensor) -> None:
        """Overwrite the memory, as its next owner would."""
        self.num_allocated -= memory.numel()
        memory.numpy().fill(POISON)  # at once, whatever torch operations are deferred to

    def memory(self) -> DeviceMemory:
        return DeviceMemory(available_bytes=self._capacity(), used_bytes=self.num_allocated)

    def return_freed(self) -> None:
        """Do nothing: nothing is kept back."""

    def staging_buffer(self, num_bytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.full((num_bytes,), POISON, dtype=torch.uint8)

    def new_stream(self) -> SimulatedStream:
        return SimulatedStream(is_lazy=self._lazy_copies)

    def new_event(self) -> SimulatedEvent:
        return SimulatedEvent()

    def current_stream(self) -> SimulatedStream:
        streams: list[SimulatedStream] = _current.__dict__.get("streams", [])
        return streams[-1] if streams else self.compute

    def issue_copy(self, source: Tensor, destination: Tensor) -> None:
        self.current_stream().issue(lambda: self._transfer(source, destination))

    def close(self) -> None:
        super().close()
        assert isinstance(self._stream, SimulatedStream)
        self._stream.close()
        self.compute.close()

    def _transfer(self, source: Tensor, destination: Tensor) -> None:
        destination.fill_(POISON)
        time.sleep(self._latency_s + source.numel() / self._bytes_per_s + self._delay_s())
        destination.copy_(source)


class EveryLock(LockRuntime):
    """A runtime that refuses no lock."""

    def register(self, address: int, num_bytes: int) -> int:
        return 0

    def unregister(self, address: int) -> None:
        pass
