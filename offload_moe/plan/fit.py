"""The plan of a store before it is loaded, by the same code as `offload-moe plan`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from offload_moe.errors import BudgetError
from offload_moe.memory.copier import free_device_memory, total_device_memory
from offload_moe.plan.advice import explain, find_shortfalls
from offload_moe.plan.budget import total_ram
from offload_moe.plan.machine import Machine, measure_machine
from offload_moe.plan.outlook import Outlook, Task
from offload_moe.plan.parameters import DenseWeight, ModelShape
from offload_moe.plan.placement import Placement, Settings, Tier, place
from offload_moe.plan.plan import check_context
from offload_moe.plan.sizes import with_narrow_embeddings
from offload_moe.plan.stored import as_stored
from offload_moe.store import Store
from offload_moe.system.sizes import format_size, typed_size


def measure_load(device: torch.device, *, vram: int | None, ram: int | None, dtype: torch.dtype) -> Machine:
    """This machine with the budgets of `load`. vram, ram: bytes given by the user.

    Raises: BudgetError when the device has less than that free.
    """
    if device.type == "cpu":
        return measure_machine(vram=0, ram=ram, dtype=dtype)
    free = free_device_memory(device)
    if vram is not None and vram > free:
        taken = format_size(total_device_memory(device) - free)
        raise BudgetError(
            f"--vram is {format_size(vram)} and {device} has {format_size(free)} free: {taken} is used by the desktop "
            f"or other processes. Leave --vram out, or set at most {typed_size(free)}."
        )
    return measure_machine(vram=vram, ram=ram, device=device, dtype=dtype)


def notices_of_budget(where: torch.device, *, vram: int | None, ram: int | None) -> list[str]:
    """Notices about budgets above this machine's memory, which are accepted because less may be needed."""
    notices = []
    if ram is not None and ram > total_ram():
        notices.append(
            f"--ram is {format_size(ram)}, and this machine has {format_size(total_ram())}. A process that needs "
            f"more is swapped or killed: set at most {typed_size(total_ram())}."
        )
    if vram and where.type == "cpu":
        notices.append(f"--vram is {format_size(vram)}, and no GPU is used: everything is computed on the CPU.")
    return notices


def fit(
    store: Store,
    shape: ModelShape,
    machine: Machine,
    *,
    context: int | None = None,
    dense_codec: str | None = None,
    is_exact: bool = False,
    draft_bytes: Callable[[int], int] | None = None,
    device_pass: bool = False,
) -> Placement:
    """The placement of a store on this machine. shape: of the store's model. draft_bytes, device_pass: see `Settings`.

    Raises:
    BudgetError: not even one expert slot fits; the message has the shortfall and remedies.
    ConfigError: the context is longer than the model's maximum.
    """
    check_context(context, shape)
    shape = with_narrow_embeddings(as_stored(shape, store), partial(_is_bf16, store))
    if not store.has_tokenizer:
        shape = replace(shape, vocabulary=0)
    settings = Settings(
        codec=store.codec,
        context=context,
        dense_codec=dense_codec,
        stored_dense_codec=store.dense_codec,
        is_exact=is_exact,
        draft_bytes=draft_bytes,
        device_pass=device_pass,
    )
    task = Task(shape=shape, machine=replace(machine, disk_bytes=None), settings=settings, is_store=True)
    placement = place(shape, task.machine, settings, download_bytes=0, is_store=True)
    if not placement.fits:
        shortfalls = find_shortfalls(task, Outlook(placement=placement, speed=None))
        raise BudgetError(" ".join(map(explain, shortfalls)))
    return placement


def _is_bf16(store: Store, weight: DenseWeight) -> bool:
    entry = store.dense.get(weight.name)
    return entry is not None and entry.dtype == torch.bfloat16


def summary(shape: ModelShape, placement: Placement) -> str:
    """The placement in one line."""
    fast, where = placement.fast, f"VRAM {_tier(placement.vram)}, " if placement.vram else ""
    share = fast.num_slots / shape.num_experts
    line = (
        f"{where}RAM {_tier(placement.ram)}; {share:.0%} of {shape.num_experts:,} experts in {fast.name}, "
        f"dense weights in {placement.dense_codec}, room for {placement.context:,} tokens"
    )
    return f"{line}; {placement.warning}" if placement.warning else line


def _tier(tier: Tier) -> str:
    return f"{format_size(tier.used_bytes)} of {format_size(tier.budget_bytes or 0)}"
