"""How many slots fit: what is needed, what there is, and the numbers of both when it does not."""

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from offload_moe.errors import BudgetError
from offload_moe.sizes import format_size

RUNTIME_BYTES = 450 << 20  # interpreter, torch, activations: what a process holds beside weights and slots
DEVICE_RESERVE_BYTES = 1 << 30  # CUDA context, workspaces, activations and a key/value cache of a few thousand tokens
SHARE_OF_FREE = 0.9  # of what is free, taken when no budget is named


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlan:
    """Slots of each tier, and the budgets they came from, in bytes."""

    num_ram_slots: int
    num_device_slots: int
    ram_bytes: int
    vram_bytes: int


def plan_slots(
    *,
    num_records: int,
    slot_bytes: int,
    dense_bytes: int,
    ram: int | None = None,
    vram: int | None = None,
    free_vram: int | None = None,
) -> SlotPlan:
    """As many slots as the budgets hold, at most one per record.

    ram, vram: bytes the whole process may use; None takes 90% of what is free. free_vram: free device memory, None
    without a device, and then dense weights live in RAM.

    Raises:
        BudgetError: not even one slot fits.
    """
    ram_budget = ram if ram is not None else int(free_ram() * SHARE_OF_FREE)
    num_ram_slots = _count_slots(
        "RAM", "--ram", ram_budget, RUNTIME_BYTES, dense_bytes if free_vram is None else 0, slot_bytes
    )
    num_device_slots, vram_budget = 0, 0
    if free_vram is not None:
        vram_budget = vram if vram is not None else int(free_vram * SHARE_OF_FREE)
        num_device_slots = _count_slots("VRAM", "--vram", vram_budget, DEVICE_RESERVE_BYTES, dense_bytes, slot_bytes)
    return SlotPlan(
        num_ram_slots=min(num_ram_slots, num_records),
        num_device_slots=min(num_device_slots, num_records),
        ram_bytes=ram_budget,
        vram_bytes=vram_budget,
    )


def free_ram() -> int:
    """Bytes of RAM this process may still take, container limits included."""
    return min(psutil.virtual_memory().available, *_free_in_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))


def _free_in_groups(root: Path, membership: Path) -> list[int]:
    """What each memory cgroup around this process still allows; page cache that can be dropped counts as free."""
    free = [sys.maxsize]
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return free
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
            free += _free_in_group(group, *names)
    return free


def _free_in_group(group: Path, limit_name: str, usage_name: str) -> list[int]:
    try:
        limit, usage = (group / limit_name).read_text().strip(), int((group / usage_name).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    droppable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", "0")))
    return [max(0, int(limit) - usage + droppable)] if limit.isdigit() else []


def _count_slots(memory: str, flag: str, budget: int, runtime_bytes: int, dense_bytes: int, slot_bytes: int) -> int:
    num_slots = (budget - runtime_bytes - dense_bytes) // slot_bytes
    if num_slots < 1:
        needed = runtime_bytes + dense_bytes + slot_bytes
        raise BudgetError(
            f"One expert slot needs {format_size(needed)} of {memory} ({format_size(dense_bytes)} dense weights, "
            f"{format_size(runtime_bytes)} runtime, {format_size(slot_bytes)} slot), the budget is "
            f"{format_size(budget)}. Raise {flag} to at least that, or choose a smaller --dense-codec."
        )
    return int(num_slots)
