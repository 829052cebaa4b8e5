"""All checks, one after another."""

from collections.abc import Callable, Iterator

from offload_moe.doctor import machine, memory_speed, storage, versions
from offload_moe.doctor.check import Check
from offload_moe.doctor.device import (
    check_device,
    check_link,
    check_torch_build,
    check_vram,
    find_device,
)
from offload_moe.doctor.device_kernels import check_device_kernels
from offload_moe.doctor.extensions import check_extensions
from offload_moe.doctor.fast_path import check_fast_path
from offload_moe.doctor.settings import check_settings
from offload_moe.errors import OffloadMoeError
from offload_moe.memory.copier import compute_device
from offload_moe.memory.nvidia import find_nvidia
from offload_moe.memory.unused_card import build_of_torch
from offload_moe.plan.machine import default_dtype
from offload_moe.store import Store
from offload_moe.system.paths import cache_dir

Work = Callable[[], Check | list[Check]]


def examine(store: Store | None = None) -> list[Check]:
    """Every check, about ten seconds. store: examine its disk too."""
    return [check for name, work in (*_asked(store), *measurements(store)) for check in guarded(name, work)]


def guarded(name: str, work: Work) -> list[Check]:
    """Run a check; an exception is a finding too, since it may be the problem that the user looks for."""
    try:
        found = work()
    except (OffloadMoeError, OSError, RuntimeError, ValueError, MemoryError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "no reason given"
        return [
            Check(
                name=name,
                verdict="problem",
                found=f"could not be examined: {type(error).__name__}: {reason}",
                fix="If the message names no remedy, send a report with `offload-moe doctor --report FILE`.",
            )
        ]
    return found if isinstance(found, list) else [found]


def _asked(store: Store | None) -> Iterator[tuple[str, Work]]:
    yield "program", versions.check_program
    yield "packages", versions.check_packages
    yield "extensions", check_extensions
    yield "config", check_settings
    yield "system", machine.check_system
    yield "processor", machine.check_processor
    yield "power", machine.check_power
    yield "RAM", machine.check_ram
    yield "device", _check_device
    yield "cache folder", lambda: storage.check_file_system("cache folder", cache_dir())
    if store is not None:
        yield "store", lambda: storage.check_file_system("store", store.path)
        yield "fast path", lambda: check_fast_path(store)
    yield "CPU kernels", memory_speed.check_kernel_paths


def measurements(store: Store | None) -> Iterator[tuple[str, Work]]:
    yield "disk read", lambda: storage.check_disk_speed(cache_dir(), store)
    yield "RAM read", memory_speed.check_memory_read
    yield "CPU kernel speed", memory_speed.check_kernel_speed
    where = compute_device()
    if where.type != "cpu":
        yield "device kernels", lambda: check_device_kernels(where, default_dtype(where))
        yield "transfers", lambda: memory_speed.check_transfers(where)


def _check_device() -> list[Check]:
    nvidia, device = find_nvidia(), find_device(compute_device())
    checks = [check_torch_build(nvidia, build_of_torch(), device), check_device(device)]
    if device is not None:
        checks.append(check_vram(device))
    if nvidia is not None and nvidia.lanes is not None:
        checks.append(check_link(nvidia))
    checks.append(machine.check_page_lock_limit(machine.page_lock_limit(), has_device=device is not None))
    return checks
