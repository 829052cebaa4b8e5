"""Pools that shrink and grow in use: no lease is broken, no byte read too late, and the memory is really given back."""

import random
import threading
from collections.abc import Callable

import psutil
import pytest
import torch
from support.deferred import DeferredCompute, fetch_top_k_after_waiting
from support.offload import MemoryMover, offload
from support.pressure import experts_of, generate, scheduler_of
from support.tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from offload_moe.errors import BudgetError, TransferError
from offload_moe.experts import routing
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.memory.arena import Arena, whole_chunks
from offload_moe.memory.device import DeviceSlots
from offload_moe.memory.page_lock import PageLock
from offload_moe.memory.simulated import POISON, SimulatedCopier
from offload_moe.residency.hierarchy import Hierarchy, Pools
from offload_moe.residency.keys import ExpertKeys

SLOT = 4096
NUM_EXPERTS = 8

TIMINGS: dict[str, Callable[[], SimulatedCopier]] = {
    "late copies": lambda: SimulatedCopier(latency_s=0, lazy_copies=True, defers_compute=True),
    "late compute": lambda: SimulatedCopier(latency_s=0, lazy_compute=True, defers_compute=True),
    "random": lambda: SimulatedCopier(delay_s=lambda: random.random() * 0.001, defers_compute=True),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3_moe")


def make(num_ram_slots: int, num_device_slots: int = 0, copier: SimulatedCopier | None = None) -> Hierarchy:
    """Two layers of eight experts; every record is its key, over and over; chunks of three slots."""
    records = {key: torch.full((SLOT,), key, dtype=torch.uint8) for key in range(2 * NUM_EXPERTS)}
    pools = Pools(
        keys=ExpertKeys([NUM_EXPERTS] * 2),
        slot_bytes=SLOT,
        num_ram_slots=num_ram_slots,
        num_device_slots=num_device_slots,
        chunk_bytes=3 * SLOT,
    )
    return Hierarchy(pools, lambda arena, _: MemoryMover(records, arena), copier)


def check_all_experts(hierarchy: Hierarchy) -> None:
    for layer in range(2):
        with hierarchy.scheduler.acquire(layer, range(NUM_EXPERTS)) as lease:
            for wave in lease:
                for expert, slot in wave:
                    assert hierarchy.record_of(slot)[:SLOT].eq(layer * NUM_EXPERTS + expert).all()


@pytest.mark.parametrize("timing", TIMINGS)
def test_the_same_bits_while_pools_shrink_and_grow(
    model: PreTrainedModel, timing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each layer, whose compute may be still to come, both pools change size; freed memory is overwritten."""
    monkeypatch.setattr(routing, "fetch_top_k", fetch_top_k_after_waiting)
    copier, draw = TIMINGS[timing](), random.Random(0)
    attached, oracle = offload(model, "bf16", 9, copier, 9, DeviceArithmetic, slots_per_chunk=2)
    sizes = set()

    def resize(*_: object) -> None:
        for tier in ("vram", "ram"):
            sizes.add(attached.hierarchy.resize(tier, draw.randrange(1, 12)))

    for module in experts_of(attached):
        module.register_forward_hook(resize)
    with DeferredCompute(copier.current_stream()):
        found = generate(attached, num_tokens=4)
    assert torch.equal(found, generate(oracle, num_tokens=4))
    assert len(sizes) > 3
    scheduler_of(attached).close()


def test_another_thread_may_resize_while_layers_are_computed(model: PreTrainedModel) -> None:
    copier = SimulatedCopier(delay_s=lambda: random.random() * 0.0005)
    attached, oracle = offload(model, "bf16", 5, copier, 6, DeviceArithmetic, slots_per_chunk=2)
    is_done, num_resized = threading.Event(), 0

    def resize() -> None:
        nonlocal num_resized
        while not is_done.wait(0.001):
            attached.hierarchy.resize("vram" if num_resized % 2 else "ram", 2 + num_resized % 7)
            num_resized += 1

    thread = threading.Thread(target=resize)
    thread.start()
    expected = generate(oracle, num_tokens=4)
    try:
        for _ in range(20):
            assert torch.equal(generate(attached, num_tokens=4), expected)
            if num_resized > 10:
                break
    finally:
        is_done.set()
        thread.join(60)
    assert num_resized > 10
    scheduler_of(attached).close()


@pytest.mark.parametrize("has_device", [False, True])
def test_every_expert_after_every_size(has_device: bool) -> None:
    hierarchy = make(7, 7, SimulatedCopier()) if has_device else make(7)
    tier = "vram" if has_device else "ram"
    check_all_experts(hierarchy)
    for wanted, with_chunks, exactly in [
        (6, 6, 6),
        (5, 3, 5),
        (1, 3, 1),
        (4, 4, 4),
        (9, 9, 9),
        (2, 3, 2),
        (99, 16, 16),
    ]:
        assert hierarchy.resize(tier, wanted) == (with_chunks if has_device else exactly)
        assert hierarchy.num_slots(tier) == hierarchy.scheduler.residency.num_slots
        check_all_experts(hierarchy)
    if not has_device:
        assert hierarchy.num_slots("vram") == 0
    hierarchy.close()


def test_whole_chunks() -> None:
    assert [whole_chunks([3, 3, 1], wanted) for wanted in (1, 3, 5, 6, 7, 8)] == [3, 3, 3, 6, 7, 8]


def test_a_lease_is_waited_for_and_not_broken() -> None:
    hierarchy = make(7, 7, SimulatedCopier())
    freed: list[int] = []
    thread = threading.Thread(target=lambda: freed.append(hierarchy.resize("vram", 1)))
    with hierarchy.scheduler.acquire(0, range(7)) as lease:
        for wave in lease:
            held = {slot: key for key, slot in wave}
            if max(held) >= 3 and thread.ident is None:
                thread.start()
                thread.join(0.05)
                assert thread.is_alive()
                assert all(hierarchy.record_of(slot).eq(key).all() for slot, key in held.items())
    thread.join(10)
    assert freed == [3]
    check_all_experts(hierarchy)
    hierarchy.close()


def test_slots_that_stay_leased_are_named_and_nothing_changes() -> None:
    hierarchy = make(7)
    with hierarchy.ram.acquire(0, range(7)) as lease:
        assert next(iter(lease))
        hierarchy.ram.stall_limit_s = 0.02
        with pytest.raises(TransferError, match=r"cannot shrink to 2 slots.*Resize between answers"):
            hierarchy.resize("ram", 2)
    hierarchy.ram.stall_limit_s = 10
    assert hierarchy.num_slots("ram") == hierarchy.arena.num_slots == 7
    check_all_experts(hierarchy)
    assert len(hierarchy.ram.residency.resident_keys()) == 7
    assert hierarchy.resize("ram", 2) == 2
    hierarchy.close()


def test_a_device_without_room_is_a_budget_error_and_the_pool_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    copier = SimulatedCopier()
    hierarchy = make(4, 4, copier)

    def refuse(num_bytes: int) -> Tensor:
        if num_bytes == SLOT:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(copier, "allocate", refuse)
    with pytest.raises(
        BudgetError, match=r"8 expert slots need 32 KiB of VRAM, and the device refused 4 KiB after 28 K"
    ):
        hierarchy.resize("vram", 8)
    assert hierarchy.num_slots("vram") == 4
    check_all_experts(hierarchy)
    hierarchy.close()


def test_freed_device_memory_belongs_to_somebody_else() -> None:
    slots = DeviceSlots(SimulatedCopier(), 6, SLOT, chunk_bytes=2 * SLOT)
    views = [slots.slot(index).zero_() for index in range(6)]
    slots.shrink(2)
    assert [int(view.max()) for view in views] == [0, 0, *[POISON] * 4]


def test_ram_is_given_back_to_the_system() -> None:
    arena = Arena(num_slots=16, slot_bytes=4 << 20, chunk_bytes=20 << 20)
    for index in range(16):
        arena.slot(index).fill_(7)
    full = psutil.Process().memory_info().rss
    arena.shrink(3)
    freed = full - psutil.Process().memory_info().rss
    assert 0.95 * 13 * arena.slot_bytes < freed < 1.05 * 13 * arena.slot_bytes
    assert [int(arena.slot(index).max()) for index in range(3)] == [7] * 3
    arena.grow(16)
    assert not arena.slot(15).any()
    arena.slot(15).fill_(1)


def test_ram_is_unlocked_before_it_is_given_back() -> None:
    locked: dict[int, int] = {}

    class Runtime:
        def register(self, address: int, num_bytes: int) -> int:
            locked[address] = num_bytes
            return 0

        def unregister(self, address: int) -> None:
            del locked[address]

    lock = PageLock(Runtime())
    hierarchy = make(8, 16, SimulatedCopier(page_lock=lock))
    check_all_experts(hierarchy)
    assert sorted(locked.values()) == [2 * SLOT, 3 * SLOT, 3 * SLOT]
    assert hierarchy.resize("ram", 5) == 3
    assert (list(locked.values()), lock.locked_bytes) == ([3 * SLOT], 3 * SLOT)
    hierarchy.resize("vram", 3)
    check_all_experts(hierarchy)
    assert hierarchy.resize("ram", 7) == 6
    check_all_experts(hierarchy)
    assert lock.locked_bytes == 6 * SLOT
    hierarchy.close()
    assert not locked


def test_a_pool_that_no_longer_holds_every_expert_gets_a_policy_that_chooses() -> None:
    hierarchy = make(16)
    check_all_experts(hierarchy)
    assert hierarchy.ram.residency.policy.name == "unranked"
    hierarchy.resize("ram", 12)
    assert hierarchy.ram.residency.policy.name == "knn"
    check_all_experts(hierarchy)
    hierarchy.resize("ram", 16)
    assert hierarchy.ram.residency.policy.name == "unranked"
    hierarchy.close()


def test_what_a_policy_has_learned_survives_every_size() -> None:
    """Also sizes with a slot for every expert, where slots were only borrowed."""
    hierarchy = make(4)
    policy = hierarchy.ram.residency.policy
    for num_slots in (5, 9, 16, 3, 4):
        hierarchy.resize("ram", num_slots)
        assert hierarchy.ram.residency.policy is policy
        check_all_experts(hierarchy)
    hierarchy.close()
