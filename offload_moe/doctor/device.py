"""The device: its use by torch, its dtypes, and its free memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offload_moe.doctor.check import Check, judge
from offload_moe.memory.copier import AMPERE, free_device_memory, total_device_memory
from offload_moe.memory.nvidia import Nvidia
from offload_moe.memory.unused_card import is_hidden, why_unused
from offload_moe.system.sizes import format_size

LITTLE_VRAM = 4 << 30
MUCH_TAKEN = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """capability: of an NVIDIA card, such as (7, 5)."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None


def find_device(device: torch.device) -> Device | None:
    """None for the CPU."""
    if device.type == "cpu":
        return None
    properties = torch.get_device_module(device).get_device_properties(device)
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return Device(
        name=properties.name,
        total_bytes=total_device_memory(device),
        free_bytes=free_device_memory(device),
        capability=(properties.major, properties.minor) if is_nvidia else None,
    )


def check_torch_build(
    nvidia: Nvidia | None,
    build: str | None,
    device: Device | None,
    *,
    environ: Mapping[str, str] | None = None,
    system: str | None = None,
) -> Check:
    """Whether the installed torch can use the installed card."""
    environ = os.environ if environ is None else environ
    card = f"{nvidia.name or 'an NVIDIA GPU'}, driver {nvidia.driver or 'unknown'}" if nvidia else "no NVIDIA driver"
    found = f"{build or 'CPU-only build'}, {card}"
    problem = warning = ""
    if nvidia is not None and device is None:
        if build is not None and is_hidden(environ):
            warning = f"CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES')} hides the GPU. Unset it."
        else:
            problem = why_unused(build, system)
    return judge("torch on the GPU", found, problem=problem, warning=warning)


def check_device(device: Device | None) -> Check:
    if device is None:
        return judge("device", "none: experts are computed by the CPU, from RAM")
    capability = f", compute capability {device.capability[0]}.{device.capability[1]}" if device.capability else ""
    found = f"{device.name}{capability}"
    if device.capability and device.capability[0] < AMPERE:
        return judge(
            "device",
            f"{found}, without bf16",
            warning="Models compute in fp16 here, and stop with a message where that overflows. Then use --dtype fp32.",
        )
    return judge("device", found)


def check_vram(device: Device) -> Check:
    taken = device.total_bytes - device.free_bytes
    found = f"{format_size(device.free_bytes)} free of {format_size(device.total_bytes)}"
    problem = warning = ""
    if device.free_bytes < LITTLE_VRAM // 2:
        problem = "Too little for dense weights and a cache. Close programs that use the card, or set --device cpu."
    elif taken > MUCH_TAKEN:
        warning = (
            f"{format_size(taken)} is used by the desktop or by other processes (`nvidia-smi` lists them). If they "
            "may grow, set a budget with --vram."
        )
    elif device.free_bytes < LITTLE_VRAM:
        warning = "Only small models keep their dense weights here. `offload-moe plan MODEL` checks a model."
    numbers = {"free_bytes": device.free_bytes, "total_bytes": device.total_bytes}
    return judge("VRAM", found, problem=problem, warning=warning, numbers=numbers)


def check_link(nvidia: Nvidia) -> Check:
    """The PCIe link, from the driver."""
    found = f"PCIe {nvidia.link_generation} x{nvidia.lanes}, the card could use x{nvidia.max_lanes}"
    narrow = nvidia.lanes is not None and nvidia.max_lanes is not None and nvidia.lanes < nvidia.max_lanes
    fix = "Missed experts cross this link. Move the card to a slot with more lanes." if narrow else ""
    return judge("PCIe link", found, warning=fix)
