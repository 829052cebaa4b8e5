"""The only file with streams and events: copies from host to device, and the order between copies and compute.

Two orders must hold. Compute reads a slot only after its copy: either its stream waits on the device for the copy's
marker, or the host has waited for it and the scheduler calls the slot resident. A copy overwrites a slot only after the
compute that read it: the copy stream waits on the device for the markers of the slot's last readers.

Slots are handed back to torch's allocator only after the host has waited for their last copy and their last readers,
so memory that is allocated on one stream and used on another needs no `record_stream`.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from offload_moe.errors import BudgetError, ConfigError
from offload_moe.memory.page_lock import PageLock

SUPPORTED = ("cuda", "xpu")  # ROCm has the name cuda; MPS shares its memory with the CPU, so nothing is moved
STAGING_BYTES = 4 << 20  # one buffer of the ring: a power of two, which torch's pinned allocator does not round up
NUM_STAGING_BUFFERS = 4
AMPERE = 8  # major compute capability; Turing is 7.5


class Stream(Protocol):
    """The methods of `torch.Stream` that this file uses."""

    @property
    def stream_id(self) -> int: ...

    def wait_event(self, event: Any) -> None: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: Any) -> Any: ...


class Event(Protocol):
    """The methods of `torch.Event` that this file uses. One that was never recorded is done."""

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """The memory of a device, as this process sees it.

    available_bytes: that tensors have or could have: free, or held by torch's allocator. What the process has from the
    driver itself (its context, code and local memory of kernels, graphs) is not among them, nor is what other programs
    have. used_bytes: of these, in tensors.
    """

    available_bytes: int
    used_bytes: int


class Marker:
    """A point in the work of a stream; done when everything issued to that stream before it is."""

    def __init__(self, stream: Stream, event: Event) -> None:
        self.stream_id = stream.stream_id
        self.event = event
        event.record(stream)

    def wait(self) -> None:
        """Block the calling thread until the point is reached."""
        self.event.synchronize()


class Copier(Protocol):
    """Moves bytes to the device beside the compute that runs there. Safe to use from several threads."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Device memory: uint8 ``[num_bytes]``."""
        ...

    def copy(self, source: Tensor, destination: Tensor, after: Iterable[Marker]) -> Marker:
        """Issue a copy that starts once `after` is done. The source must stay as it is until the marker is done."""
        ...

    def is_direct(self, source: Tensor) -> bool:
        """Whether the device can read this memory directly, so that `copy` returns at once."""
        ...

    def follow(self, copied: Marker, limit_s: float) -> bool:
        """Order compute that the calling thread issues from now on after the copy. Returns whether the host has waited.

        Raises: TimeoutError when the host waits for longer than `limit_s`.
        """
        ...

    def mark(self) -> Marker:
        """Mark the point behind all compute that the calling thread has issued so far."""
        ...

    def free(self, memory: Tensor) -> None:
        """Give device memory back. No copy or compute on it may be under way or follow."""
        ...

    def memory(self) -> DeviceMemory:
        """What the device has for this process. Raises: BudgetError when it does not report that."""
        ...

    def return_freed(self) -> None:
        """Let other programs have what was freed."""
        ...

    def unlock(self, memory: Tensor) -> None:
        """Unlock the chunk of host memory that this is a part of. No copy from it may be under way."""
        ...

    def close(self) -> None:
        """Unlock all page-locked memory. No copy may be under way."""
        ...


class StreamCopier(ABC):
    """Copies on one stream. Sources that cannot be page-locked pass through a small ring of buffers that are.

    This class defines the order; a subclass defines stream, event and copy.
    """

    def __init__(self, page_lock: PageLock) -> None:
        self._page_lock = page_lock
        self._stream = self.new_stream()
        self._ring: deque[tuple[Tensor, Event]] = deque()  # buffers, each with the end of the last copy out of it
        self._ring_lock = threading.Lock()

    def copy(self, source: Tensor, destination: Tensor, after: Iterable[Marker]) -> Marker:
        with self._stream:  # in this thread, which also gets the stream's device
            for marker in after:
                self._stream.wait_event(marker.event)
            if self.is_direct(source):
                self.issue_copy(source, destination)
            else:
                self._copy_through_ring(source, destination)
            return Marker(self._stream, self.new_event())

    def is_direct(self, source: Tensor) -> bool:
        return self._page_lock.holds(source)

    def follow(self, copied: Marker, limit_s: float) -> bool:
        self.current_stream().wait_event(copied.event)
        return False

    def mark(self) -> Marker:
        return Marker(self.current_stream(), self.new_event())

    def unlock(self, memory: Tensor) -> None:
        self._page_lock.unlock(memory)

    def close(self) -> None:
        self._page_lock.close()

    def _copy_through_ring(self, source: Tensor, destination: Tensor) -> None:
        with self._ring_lock:
            for _ in range(NUM_STAGING_BUFFERS - len(self._ring)):
                self._ring.append((self.staging_buffer(STAGING_BYTES), self.new_event()))
            for part, target in zip(source.split(STAGING_BYTES), destination.split(STAGING_BYTES), strict=True):
                buffer, last_read = self._ring[0]
                self._ring.rotate(-1)
                last_read.synchronize()
                staged = buffer[: part.numel()].copy_(part)
                self.issue_copy(staged, target)
                last_read.record(self._stream)

    @abstractmethod
    def allocate(self, num_bytes: int) -> Tensor:
        """Device memory: uint8 ``[num_bytes]``."""

    @abstractmethod
    def free(self, memory: Tensor) -> None:
        """Give device memory back. No copy or compute on it may be under way or follow."""

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """See `Copier.memory`."""

    @abstractmethod
    def return_freed(self) -> None:
        """Let other programs have what was freed."""

    @abstractmethod
    def staging_buffer(self, num_bytes: int) -> Tensor:
        """Host memory that the device can read directly: uint8 ``[num_bytes]``."""

    @abstractmethod
    def new_stream(self) -> Stream: ...

    @abstractmethod
    def new_event(self) -> Event: ...

    @abstractmethod
    def current_stream(self) -> Stream:
        """The stream of the calling thread's compute."""

    @abstractmethod
    def issue_copy(self, source: Tensor, destination: Tensor) -> None:
        """Start a copy on the calling thread's current stream, without waiting for it."""


class AcceleratorCopier(StreamCopier):
    """Copies to a real device: CUDA, ROCm, XPU, whatever `torch.accelerator` offers."""

    def __init__(self, device: torch.device, page_lock: PageLock | None = None) -> None:
        self._device = device
        super().__init__(page_lock or PageLock(CudaRuntime(device) if device.type == "cuda" else None))

    def allocate(self, num_bytes: int) -> Tensor:
        with torch.inference_mode(False):  # loader threads write to it, whatever mode it is allocated in
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def free(self, memory: Tensor) -> None:
        """Do nothing: the allocator takes the memory back when its last view is gone."""

    def memory(self) -> DeviceMemory:
        free, held = _memory_info(self._device)[0], torch.accelerator.memory_reserved(self._device)
        return DeviceMemory(available_bytes=free + held, used_bytes=torch.accelerator.memory_allocated(self._device))

    def return_freed(self) -> None:
        torch.accelerator.empty_cache()

    def staging_buffer(self, num_bytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def new_stream(self) -> Stream:
        return torch.Stream(self._device)

    def new_event(self) -> Event:
        return torch.Event(self._device)

    def current_stream(self) -> Stream:
        return torch.accelerator.current_stream(self._device)

    def issue_copy(self, source: Tensor, destination: Tensor) -> None:
        destination.copy_(source, non_blocking=True)


class CudaRuntime:
    """Locks pages through the runtime that torch has loaded."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._scratch = torch.zeros(1, device=device)

    def register(self, address: int, num_bytes: int) -> int:
        portable, mapped = 1, 2  # by other threads, and by kernels
        code = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, portable | mapped))
        if code:
            self._drain_error()
        return code

    def unregister(self, address: int) -> None:
        if int(torch.cuda.cudart().cudaHostUnregister(address)):
            self._drain_error()

    def _drain_error(self) -> None:
        """Clear the error that a refused call leaves latched, which the next kernel launch would raise."""
        with suppress(RuntimeError):
            self._scratch.fill_(1)


def compute_device(name: str | None = None) -> torch.device:
    """The device to compute on; None chooses the accelerator when there is one.

    Raises: ConfigError when the machine has no such device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    offered = [f"{found.type}:{index}" for index in range(torch.accelerator.device_count())] if found else []
    if found is None or found.type not in SUPPORTED:
        offered = []
    if name is None:
        return torch.device(offered[0] if offered else "cpu")
    full_name = f"{name}:0" if name in SUPPORTED else name
    if full_name not in ("cpu", *offered):
        raise ConfigError(f"No device {name!r} here. Choose one of: {', '.join(['cpu', *offered])}.")
    return torch.device(full_name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic: NVIDIA cards before Ampere, such as Turing's, emulate it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device)[0] >= AMPERE


def free_device_memory(device: torch.device) -> int:
    """Bytes that can be allocated now: free on the device, or held unused by torch's allocator.

    Raises: BudgetError when the device does not report its memory.
    """
    unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return _memory_info(device)[0] + unused


def peak_device_memory(device: torch.device) -> int:
    """The most bytes that torch has held on the device at once; the device's own context is not included."""
    return torch.accelerator.max_memory_reserved(device)


def total_device_memory(device: torch.device) -> int:
    """Bytes of the device. Raises: BudgetError when it does not report them."""
    return _memory_info(device)[1]


def _memory_info(device: torch.device) -> tuple[int, int]:
    try:
        return torch.accelerator.get_memory_info(device)
    except RuntimeError as error:
        raise BudgetError(f"{device} does not report how much memory it has. Name a budget with --vram.") from error
