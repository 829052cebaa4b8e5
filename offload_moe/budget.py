"""How many slots fit: what is needed, what there is, and the numbers of both when it does not."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from offload_moe.errors import BudgetError
from offload_moe.sizes import format_size

RUNTIME_BYTES = 450 << 20  # interpreter, torch, activations: what a process holds beside weights and slots
DEVICE_RESERVE_BYTES = 1 << 30  # CUDA context, workspaces, activations and a key/value cache of a few thousand tokens
SHARE_OF_FREE = 0.9  # of what is free, taken when no budget is named

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


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
    free = psutil.virtual_memory().available
    for limit_file, usage_file in _CGROUP_FILES:
        try:
            limit, usage = Path(limit_file).read_text().strip(), Path(usage_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            free = min(free, max(0, int(limit) - int(usage)))
    return int(free)


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
