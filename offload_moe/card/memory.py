"""Device memory of a pass: torch's, so that one allocator and one account have all of it."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offload_moe.card.structs import struct
from offload_moe.errors import BudgetError
from offload_moe.quant.layout import round_up
from offload_moe.system.sizes import format_size

ALIGNMENT = 256
LEAST_COLUMNS = 64  # a block of activations
GROUP = 32  # the fewest columns that share a scale

Allocate = Callable[[int], Tensor]  # uint8 on the device


def allocator(device: torch.device) -> Allocate:
    """Memory that is zero at first."""

    def allocate(num_bytes: int) -> Tensor:
        try:
            with torch.inference_mode(False):
                return torch.zeros(round_up(max(num_bytes, 1), ALIGNMENT), dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise BudgetError(f"The device refused {format_size(num_bytes)} for the device pass.") from error

    return allocate


def write(memory: Tensor, value: "ctypes.Structure | ctypes.Array[Any]") -> None:
    """Copy structs to the device; no pass may be under way."""
    content = torch.frombuffer(bytearray(bytes(value)), dtype=torch.uint8)
    memory[: len(content)] = content


class Scratch:
    """Named buffers that the layers of a pass share: one after the other uses them.

    Layers are described twice: at first to find the greatest size of each buffer.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._buffers: dict[str, Tensor] = {}

    def make(self, allocate: Allocate) -> None:
        """Allocate the buffers that were asked for so far."""
        self._buffers = {name: allocate(num_bytes) for name, num_bytes in self._sizes.items()}

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def tensor(self, name: str) -> Tensor:
        """uint8."""
        return self._buffers[name]

    def floats(self, name: str, *shape: int) -> int:
        """The address of numbers of four bytes."""
        num_bytes = 4
        for size in shape:
            num_bytes *= size
        return self._bytes(name, num_bytes)

    def input(self, name: str, rows: int, columns: int) -> "object":
        """`om_card_input` for rows of so many columns."""
        padded = round_up(columns, LEAST_COLUMNS)
        quants = self._bytes(f"{name} quants", rows * padded)
        return struct("input")(quants=quants, scales=self._bytes(f"{name} scales", rows * (padded // GROUP) * 4))

    def of(self, name: str, kind: str) -> int:
        """The address of a struct."""
        return self._bytes(name, ctypes.sizeof(struct(kind)))

    def addresses(self, name: str, count: int) -> int:
        return self._bytes(name, 8 * count)

    def _bytes(self, name: str, num_bytes: int) -> int:
        if name in self._buffers:
            assert self._buffers[name].numel() >= num_bytes
            return self._buffers[name].data_ptr()
        self._sizes[name] = max(self._sizes.get(name, 0), num_bytes)
        return 0
