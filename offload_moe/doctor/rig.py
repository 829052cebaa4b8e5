"""The small model on the engine: on the CPU, on the device, or on a simulated device."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from offload_moe.doctor.copiers import MakeCopier
from offload_moe.engine.build import Blueprint, build, pools_of
from offload_moe.families.text_model import TextModel
from offload_moe.residency.hierarchy import Hierarchy
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
    hf: TextModel
    experts: list[nn.Module]
    hierarchy: Hierarchy


@contextmanager
def running(store: Store, setting: Setting, dtype: torch.dtype = torch.float32) -> Iterator[Rig]:
    """The model of a store on the engine, closed at the end."""
    has_tier = setting.make_copier is not None
    pools = pools_of(
        store,
        slot_bytes=max(layer.record_bytes for layer in store.layers),
        num_ram_slots=setting.num_ram_slots,
        num_device_slots=setting.num_device_slots if has_tier else 0,
    )
    blueprint = Blueprint(
        pools=pools,
        device=setting.device,
        dtype=dtype,
        make_copier=setting.make_copier,
        # A simulated device computes on the CPU with the arithmetic of a real one; its type is all that chooses.
        experts_device=torch.device("cuda") if has_tier and setting.device.type == "cpu" else None,
        is_exact=setting.is_exact,
        prefetch=setting.prefetch,
    )
    engine = build(store, blueprint)
    hierarchy = engine.hierarchy
    for scheduler in (hierarchy.scheduler, hierarchy.ram):
        scheduler.stall_limit_s = STALL_LIMIT_S
    try:
        yield Rig(hf=engine.hf, experts=[layer.module for layer in engine.layers], hierarchy=hierarchy)
    finally:
        hierarchy.close()


def overwrite_what_was_released(rig: Rig) -> None:
    """After each layer, load other experts into every slot, while the layer's compute may still be queued."""
    scheduler, draw = rig.hierarchy.scheduler, random.Random(0)
    num_keys = scheduler.keys.total
    residency = scheduler.residency

    def is_quiet() -> bool:
        return all(residency.state(slot) is not SlotState.LOADING for slot in range(residency.num_slots))

    def overwrite(*_: object) -> None:
        for key in draw.sample(range(num_keys), min(num_keys, residency.num_slots)):
            layer, expert = scheduler.keys.layer_expert(key)
            scheduler.prefetch(layer, [expert])
        with scheduler.changed:
            scheduler.changed.wait_for(is_quiet, timeout=STALL_LIMIT_S)

    for module in rig.experts:
        module.register_forward_hook(overwrite)
