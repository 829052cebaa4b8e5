"""Available memory, and the memory of a process without weights.

The division of the memory is in `offload_moe.plan.placement`.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

PROCESS_BYTES = 370 << 20  # interpreter, torch, transformers: a process without weights and slots
TOKEN_BYTES = 1000  # tokenizer, per entry of its vocabulary
RUNTIME_BYTES = 420 << 20  # both, with a vocabulary of 50,000
DEVICE_RESERVE_BYTES = 1 << 30  # CUDA context, workspaces, activations and a key/value cache of a few thousand tokens
CPU_PROMPT_TOKENS, DEVICE_PROMPT_TOKENS = 512, 2048  # of a prompt, computed at once; compute then hides the loads
SHARE_OF_FREE = 0.9  # of the free memory, the default budget

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK_BYTES = 1 << 20


def runtime_bytes(vocabulary: int) -> int:
    """Bytes of a process without weights and slots. vocabulary: entries of its tokenizer."""
    return PROCESS_BYTES + vocabulary * TOKEN_BYTES


def default_ram() -> int:
    """The default budget: most of the free memory, plus the memory that the process already uses.

    Only the runtime counts as used: other allocations of the process precede the model and are not part of it.
    """
    return int(free_ram() * SHARE_OF_FREE) + min(psutil.Process().memory_info().rss, RUNTIME_BYTES)


def give_back_freed_memory() -> None:
    """Make glibc return large freed blocks to the system at once, including those that are free now.

    By default glibc keeps them after the first few: half a gigabyte after a conversion, and after a long prompt the
    gaps between its keys and values, a tenth of the process with the demo. No effect with other C libraries.
    """
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        mallopt, malloc_trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        if malloc_trim is not None:
            malloc_trim(0)


def forget_peak() -> None:
    """Reset `peak_ram`, if the system can, because an earlier conversion is not part of the model's peak."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_ram() -> int:
    """The peak of this process's RAM, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def free_ram() -> int:
    """Bytes of RAM this process may still take, container limits included."""
    return min(psutil.virtual_memory().available, *free_in_groups(CGROUPS, MEMBERSHIP))


def total_ram() -> int:
    """Bytes of RAM of this machine, or of the container's limit."""
    total = psutil.virtual_memory().total
    for group, limit_name, _ in _memory_groups(CGROUPS, MEMBERSHIP):
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            total = min(total, int((group / limit_name).read_text()))
    return total


def free_in_groups(root: Path, membership: Path) -> list[int]:
    """What each memory cgroup around this process still allows; page cache that can be dropped counts as free."""
    return [sys.maxsize, *(free for group in _memory_groups(root, membership) for free in _free_in_group(*group))]


def _memory_groups(root: Path, membership: Path) -> Iterator[tuple[Path, str, str]]:
    """The memory cgroups of this process, with the names of the files for limit and usage."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        is_v2 = controllers == ""
        if not is_v2 and "memory" not in controllers.split(","):
            continue
        names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        top = root if is_v2 else root / "memory"
        inner = top / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group == top.parent:
                break
            yield group, *names


def _free_in_group(group: Path, limit_name: str, usage_name: str) -> list[int]:
    try:
        limit, usage = (group / limit_name).read_text().strip(), int((group / usage_name).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    droppable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", "0")))
    return [max(0, int(limit) - usage + droppable)] if limit.isdigit() else []
