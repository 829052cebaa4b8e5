"""The copiers of a self-test: the device's own, or simulated ones with good and with bad timing."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from offload_moe.memory.copier import AcceleratorCopier, Copier
from offload_moe.memory.page_lock import PageLock
from offload_moe.memory.simulated import SimulatedCopier

LATEST_S = 0.002
LINK_BYTES_PER_S = 1e9  # slow enough that a copy takes longer than the noise of a clock

MakeCopier = Callable[[], Copier]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copiers:
    """late: with another order or timing of copies."""

    calm: MakeCopier
    late: tuple[MakeCopier, ...]


def copiers_for(device: torch.device) -> Copiers:
    return simulated_copiers() if device.type == "cpu" else device_copiers(device)


def device_copiers(device: torch.device) -> Copiers:
    """Page-locked, and through the staging ring."""
    calm = partial(AcceleratorCopier, device)
    return Copiers(calm=calm, late=(calm, partial(AcceleratorCopier, device, PageLock(None))))


def simulated_copiers(kind: type[SimulatedCopier] = SimulatedCopier) -> Copiers:
    """Copiers with random delays, and with copies that run only when a thread waits for them."""
    delay = partial(random.Random(0).uniform, 0.0, LATEST_S)
    return Copiers(
        calm=partial(kind, LINK_BYTES_PER_S),
        late=(partial(kind, LINK_BYTES_PER_S, 0.0, delay), partial(kind, lazy_copies=True)),
    )
