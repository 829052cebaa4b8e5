"""Whether copies run concurrently with compute."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from offload_moe.doctor.copiers import MakeCopier
from offload_moe.doctor.outcome import Failed
from offload_moe.memory.arena import Arena
from offload_moe.memory.copier import Copier

NUM_COPIES = 4
MAX_TRIALS = 20  # trials, as other programs disturb a measurement; serial work never overlaps in any of them
SIMULATED_COPY_BYTES, DEVICE_COPY_BYTES = 8 << 20, 64 << 20
HOST_MATRIX, DEVICE_MATRIX = 128, 4096
HIDDEN_SHARE = 0.5  # required, of the shorter of the two


def check_overlap(device: torch.device, make_copier: MakeCopier) -> str:
    """Measure the overlap. Raises: Failed when both together take about as long as one after the other."""
    copier = make_copier()
    best = Times(float("inf"), float("inf"), float("inf"))
    try:
        for trial in _trials(device, copier):
            best = Times(*map(min, best, trial))
            if best.hidden >= HIDDEN_SHARE:
                return f"{best}: {min(best.hidden, 1.0):.0%} of the shorter is hidden"
    finally:
        copier.close()
    raise Failed(f"{best}: {max(best.hidden, 0.0):.0%} of the shorter is hidden, {HIDDEN_SHARE:.0%} expected")


class Times(NamedTuple):
    """Seconds of the copies alone, of compute alone, and of both at once."""

    copy: float
    compute: float
    both: float

    @property
    def hidden(self) -> float:
        """The share of the shorter that is hidden behind the longer."""
        return (self.copy + self.compute - self.both) / min(self.copy, self.compute)

    def __str__(self) -> str:
        copy, compute, both = (seconds * 1e3 for seconds in self)
        return f"copies {copy:.1f} ms, compute {compute:.1f} ms, both {both:.1f} ms"


def _trials(device: torch.device, copier: Copier) -> Iterator[Times]:
    is_simulated = device.type == "cpu"
    num_bytes = SIMULATED_COPY_BYTES if is_simulated else DEVICE_COPY_BYTES
    arena, target = Arena(NUM_COPIES, num_bytes), copier.allocate(num_bytes)
    size = HOST_MATRIX if is_simulated else DEVICE_MATRIX
    matrix = torch.ones(size, size, device=device)

    def copy() -> None:
        wait(issue())

    def issue() -> list[Callable[[], None]]:
        return [copier.copy(arena.slot(index), target, after=()).wait for index in range(NUM_COPIES)]

    def both() -> None:
        waits = issue()
        compute()
        wait(waits)

    def wait(waits: list[Callable[[], None]]) -> None:
        for one in waits:
            one()

    _seconds(device, copy)  # warms up and locks the pages
    compute = _compute_for(min(_seconds(device, copy) for _ in range(3)), matrix)
    for _ in range(MAX_TRIALS):
        yield Times(_seconds(device, copy), _seconds(device, compute), _seconds(device, both))


def _compute_for(seconds: float, matrix: Tensor) -> Callable[[], None]:
    """Run matrix products for about that long; on a device they are only issued, without a wait."""

    def multiply() -> None:
        torch.mm(matrix, matrix)

    def compute_on_host() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            multiply()

    if matrix.is_cpu:
        return compute_on_host
    one_s = min(_seconds(matrix.device, multiply) for _ in range(5))
    num_products = max(1, min(1000, round(seconds / one_s)))

    def compute_on_device() -> None:
        for _ in range(num_products):
            multiply()

    return compute_on_device


def _seconds(device: torch.device, work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begun
