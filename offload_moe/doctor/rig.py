"""The small model on the engine: on the CPU, on the device, or on a simulated device."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload_moe.doctor.copiers import MakeCopier
from offload_moe.engine.assemble import assemble
from offload_moe.engine.model import attach_experts
from offload_moe.memory.disk import DiskMover
from offload_moe.residency.hierarchy import Hierarchy, Pools
from offload_moe.residency.residency import SlotState
from offload_moe.store import Store

STALL_LIMIT_S = 20.0
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One configuration of the engine.

    device: of dense weights and compute. make_copier: None without a device tier.

    num_device_slots is unused without a device tier.
    """

    device: torch.device = CPU
    make_copier: MakeCopier | None = None
    num_ram_slots: int = 24
    num_device_slots: int = 24
    is_exact: bool = True
    prefetch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    hf: Any
    experts: list[nn.Module]
    hierarchy: Hierarchy


@contextmanager
def running(store: Store, setting: Setting, dtype: torch.dtype = torch.float32) -> Iterator[Rig]:
    """The model of a store on the engine, closed at the end."""
    assembled = assemble(store, setting.device, dtype, mode="exact" if setting.is_exact else "fast")
    copier = setting.make_copier() if setting.make_copier else None
    pools = Pools(
        num_layers=len(store.layers),
        num_experts=store.num_experts,
        slot_bytes=max(layer.record_bytes for layer in store.layers),
        num_ram_slots=setting.num_ram_slots,
        num_device_slots=setting.num_device_slots if copier else 0,
    )
    hierarchy = Hierarchy(
        pools, lambda arena: DiskMover(arena, lambda key: store.record(*divmod(key, store.num_experts))), copier
    )
    for scheduler in (hierarchy.scheduler, hierarchy.ram):
        scheduler.stall_limit_s = STALL_LIMIT_S
    # A simulated device computes on the CPU with the arithmetic of a real one, which is chosen by its type.
    arithmetic = torch.device("cuda") if copier and setting.device.type == "cpu" else setting.device
    try:
        attach_experts(
            assembled,
            store,
            hierarchy,
            arithmetic,
            dtype=dtype,
            is_exact=setting.is_exact,
            prefetch=setting.prefetch,
        )
        yield Rig(hf=assembled.hf, experts=[layer.module for layer in assembled.layers], hierarchy=hierarchy)
    finally:
        hierarchy.close()


def overwrite_what_was_released(rig: Rig) -> None:
    """After each layer, load other experts into every slot, while the layer's compute may still be queued."""
    scheduler, draw = rig.hierarchy.scheduler, random.Random(0)
    num_keys = len(rig.experts) * scheduler.num_experts
    residency = scheduler.residency

    def is_quiet() -> bool:
        return all(residency.state(slot) is not SlotState.LOADING for slot in range(residency.num_slots))

    def overwrite(*_: object) -> None:
        for key in draw.sample(range(num_keys), min(num_keys, residency.num_slots)):
            layer, expert = divmod(key, scheduler.num_experts)
            scheduler.prefetch(layer, [expert])
        with scheduler.changed:
            scheduler.changed.wait_for(is_quiet, timeout=STALL_LIMIT_S)

    for module in rig.experts:
        module.register_forward_hook(overwrite)
