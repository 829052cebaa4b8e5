"""The machine: system, processor, power, RAM, and the limit of page-locked memory."""

import os
import platform
from pathlib import Path

import psutil
import torch

from offload_moe.doctor.check import Check, judge
from offload_moe.plan.budget import RUNTIME_BYTES, free_ram
from offload_moe.system.cores import usable_cores
from offload_moe.system.sizes import format_size

LITTLE_RAM = 4 << 30
WORTH_LOCKING = 1 << 30
HIDDEN_SHARE = 0.9  # of the machine's free memory; less for this process means a container's or group's limit


def check_system() -> Check:
    name = "WSL2 on Windows" if is_wsl() else f"{platform.system()} {platform.release()}"
    return judge("system", f"{name}, {platform.machine()}")


def is_wsl(release: str | None = None) -> bool:
    return "microsoft" in (platform.release() if release is None else release).lower()


def check_processor() -> Check:
    """Usable cores, which a container or an affinity mask may restrict."""
    usable = len(usable_cores()) or os.cpu_count() or 1
    found = f"{_processor_name()}, usable cores: {usable}, threads of torch: {torch.get_num_threads()}"
    crowded = torch.get_num_threads() > usable
    fix = f"There are more threads than cores. Set OMP_NUM_THREADS={usable}." if crowded else ""
    return judge("processor", found, warning=fix)


def check_power(battery: object | None = None) -> Check:
    """Check for mains power.

    battery: the result of `psutil.sensors_battery`.
    """
    battery = battery or (psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None)
    if battery is None:
        return judge("power", "mains")
    if getattr(battery, "power_plugged", None) is False:
        return judge(
            "power",
            "on battery",
            warning="Laptops slow their processor, memory and PCIe link on battery. Plug it in before measuring.",
        )
    return judge("power", "mains, with a battery")


def check_ram() -> Check:
    """The free memory of this process, container limits included."""
    memory = psutil.virtual_memory()
    free = free_ram()
    limited = ", restricted by a container or group limit" if free < HIDDEN_SHARE * memory.available else ""
    found = f"{format_size(free)} free to this process{limited}, {format_size(memory.total)} in the machine"
    problem = warning = ""
    if free < 2 * RUNTIME_BYTES:
        problem = f"Less than {format_size(2 * RUNTIME_BYTES)} is free. Close programs, or raise the container's limit."
    elif free < LITTLE_RAM:
        warning = "Few experts fit beside the runtime, so most come from disk. Close programs, or raise the limit."
    numbers = {"free_bytes": free, "available_bytes": memory.available, "total_bytes": memory.total}
    return judge("RAM", found, problem=problem, warning=warning, numbers=numbers)


def check_page_lock_limit(limit_bytes: int | None, *, has_device: bool) -> Check:
    """Check the limit of page-locked memory.

    limit_bytes: of RLIMIT_MEMLOCK; None means no limit.
    """
    if limit_bytes is None:
        return judge("page-lock limit", "none")
    found = f"{format_size(limit_bytes)}, as `ulimit -l` says"
    # The CUDA driver ignores this limit when it locks memory; after a refusal, it is the first thing to raise.
    too_low = limit_bytes < WORTH_LOCKING and has_device and is_wsl()
    fix = (
        "Raise it: memlock in /etc/security/limits.conf; WSL2 locks only a part of RAM in any case." if too_low else ""
    )
    return judge("page-lock limit", found, warning=fix, numbers={"limit_bytes": limit_bytes})


def page_lock_limit() -> int | None:
    """The soft limit of this process, in bytes; None when there is none."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
