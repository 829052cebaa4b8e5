"""The only file with streams and events: copies between host and device, and the order between copies and compute."""

from typing import Protocol

import torch
from torch import Tensor


class Marker(Protocol):
    """A point in the work of a stream; done when everything before it is."""

    def wait(self) -> None:
        """Block the calling thread until the point is reached."""


class Copier(Protocol):
    """Moves bytes to the device beside the compute that runs there."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Device memory: uint8 ``[num_bytes]``."""
        ...

    def copy(self, source: Tensor, destination: Tensor, after: Marker | None) -> Marker:
        """Issue a copy that starts once `after` is done. The source must stay as it is until the marker is done."""
        ...

    def mark(self) -> Marker:
        """The point behind all compute issued so far."""
        ...


class _StreamMarker:
    def __init__(self, event: torch.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class AcceleratorCopier:
    """A copy stream of its own on the current accelerator (CUDA, ROCm, XPU: whatever `torch.accelerator` offers)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def copy(self, source: Tensor, destination: Tensor, after: Marker | None) -> Marker:
        with self._stream:
            if isinstance(after, _StreamMarker):
                self._stream.wait_event(after.event)
            destination.copy_(source, non_blocking=True)
            return _StreamMarker(self._stream.record_event())

    def mark(self) -> Marker:
        return _StreamMarker(torch.accelerator.current_stream(self._device).record_event())
