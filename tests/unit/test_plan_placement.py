"""Where everything goes, what does not fit, and what would make it."""

import math
import re
from dataclasses import replace

import pytest
import torch

from offload_moe.plan.advice import find_shortfalls
from offload_moe.plan.budget import DEVICE_RESERVE_BYTES, runtime_bytes
from offload_moe.plan.machine import Machine, measure_machine
from offload_moe.plan.outlook import Task, look_ahead
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.placement import Settings, Tier, place
from offload_moe.plan.sizes import dense_memory_bytes, slot_bytes, store_bytes
from offload_moe.plan.working import cache_bytes
from offload_moe.system.sizes import format_size, parse_size
from tests.support.plan import GIB, real_shape, task, tiny_shape


@pytest.fixture(scope="module")
def mixtral() -> ModelShape:
    return real_shape("Mixtral-8x7B-v0.1")


@pytest.fixture(scope="module")
def deepseek() -> ModelShape:
    return real_shape("DeepSeek-V3")


def parts(tier: Tier | None) -> dict[str, int]:
    assert tier is not None
    return {part.name: part.num_bytes for part in tier.fixed}


def test_without_a_device_everything_is_in_ram(mixtral: ModelShape) -> None:
    placement = look_ahead(task(mixtral, Machine(ram_bytes=20 * GIB), dense_codec="nf4")).placement
    ram = parts(placement.ram)
    assert placement.vram is None
    assert ram["runtime"] == runtime_bytes(32_000)
    assert ram["dense weights"] == dense_memory_bytes(mixtral, "nf4", torch.float32)
    assert ram["key/value cache"] == cache_bytes(mixtral, 64, torch.float32, kept=torch.bfloat16)
    assert placement.ram.num_slots == (20 * GIB - sum(ram.values())) // slot_bytes(mixtral, "nf4")
    assert 20 * GIB - slot_bytes(mixtral, "nf4") < placement.ram.used_bytes <= 20 * GIB


def test_with_a_device_ram_holds_experts_only(mixtral: ModelShape) -> None:
    machine = Machine(vram_bytes=12 * GIB, ram_bytes=16 * GIB)
    placement = look_ahead(task(mixtral, machine, dense_codec="int8")).placement
    assert parts(placement.ram) == {"runtime": runtime_bytes(32_000)}
    vram = parts(placement.vram)
    assert vram["device context and workspaces"] == DEVICE_RESERVE_BYTES
    assert vram["dense weights"] == dense_memory_bytes(mixtral, "int8", torch.bfloat16)


def test_no_more_slots_than_experts() -> None:
    shape = tiny_shape("mixtral")
    assert look_ahead(task(shape, Machine(ram_bytes=GIB))).placement.ram.num_slots == 18


def test_the_most_exact_dense_codec_is_taken_that_leaves_room_for_every_top_k(mixtral: ModelShape) -> None:
    def chosen(gib: float) -> str:
        machine = Machine(vram_bytes=int(gib * GIB), ram_bytes=64 * GIB)
        return look_ahead(task(mixtral, machine)).placement.dense_codec

    assert [chosen(gib) for gib in (24, 12, 9, 4, 2.6)] == ["bf16", "bf16", "int8", "int8", "nf4"]


def test_the_cpu_takes_int8_and_nf4_only_where_nothing_else_fits(mixtral: ModelShape) -> None:
    def chosen(gib: float, **settings: object) -> str:
        return look_ahead(task(mixtral, Machine(ram_bytes=int(gib * GIB)), **settings)).placement.dense_codec

    assert [chosen(gib) for gib in (64, 4, 2.2)] == ["int8", "int8", "nf4"]
    assert chosen(64, is_exact=True) == chosen(64, codec="bf16") == "bf16"
    assert chosen(2.5, stored_dense_codec="int8") == "int8"
    assert chosen(64, dense_codec="nf4") == "nf4"


def test_a_usable_context_comes_before_many_slots(mixtral: ModelShape) -> None:
    def planned(gib: float) -> int:
        machine = Machine(vram_bytes=int(gib * GIB), ram_bytes=64 * GIB)
        return look_ahead(task(mixtral, machine, context=None, dense_codec="bf16")).placement.context

    assert [planned(gib) for gib in (24, 10.5, 6, 5.5, 5, 3)] == [8192, 8192, 8192, 4096, 2048, 1024]


@pytest.mark.parametrize("has_device", [True, False], ids=["vram", "ram"])
@pytest.mark.parametrize("name", ["Mixtral-8x7B-v0.1", "GLM-4.5-Air"])
def test_more_memory_never_gives_less(name: str, has_device: bool) -> None:
    """Neither a shorter context nor coarser weights; and whoever names the context that was chosen gets no better."""
    shape, found = real_shape(name), set()
    fits, context, exactness = False, 0, 0
    for num_bytes in (int(GIB * 1.15**step) for step in range(5, 25)):
        machine = Machine(ram_bytes=num_bytes)
        if has_device:
            machine = Machine(vram_bytes=num_bytes, ram_bytes=64 * GIB)
        placement = place(shape, machine, Settings(codec="nf4"), download_bytes=0, is_store=True)
        least = (fits, context, exactness)
        fits, context = placement.fits, placement.context
        exactness = ("nf4", "int8", "bf16").index(placement.dense_codec)
        assert all(now >= before for now, before in zip((fits, context, exactness), least, strict=True))
        named = place(shape, machine, Settings(codec="nf4", context=context), download_bytes=0, is_store=True)
        assert named == placement
        found.add((fits, context, exactness))
    assert len(found) > 3
    assert (fits, context) == (True, 8192)


def test_a_large_head_in_int8_does_not_push_the_context_out() -> None:
    """The head of GLM-4.5-Air, 151,552 rows, would take 3.5 GiB where it is decoded as a whole."""
    machine = Machine(vram_bytes=12 * GIB, ram_bytes=64 * GIB)
    placement = look_ahead(task(real_shape("GLM-4.5-Air"), machine, context=None)).placement
    assert (placement.context, placement.dense_codec, placement.fits) == (8192, "int8", True)
    assert parts(placement.vram)["dequantized tiles"] == 4096 * 4096 * (4 + 2)


def test_what_does_not_fit_says_by_how_much(deepseek: ModelShape) -> None:
    machine = Machine(vram_bytes=12 * GIB, ram_bytes=64 * GIB)
    planned = task(deepseek, machine, context=8192)
    outlook = look_ahead(planned)
    assert outlook.speed is None
    (shortfall,) = find_shortfalls(planned, outlook)
    assert shortfall.memory == "VRAM"
    assert outlook.placement.vram is not None
    fixed = sum(parts(outlook.placement.vram).values())
    assert shortfall.needed_bytes == fixed + slot_bytes(deepseek, "nf4")
    assert shortfall.missing_bytes == shortfall.needed_bytes - 12 * GIB
    named = math.ceil(10 * shortfall.needed_bytes / GIB) / 10
    assert named > 15
    assert shortfall.remedies == ("--vram 0 (everything in RAM)", f"--vram {named}GiB")


@pytest.mark.parametrize("vram", [0, 64 * GIB], ids=["ram", "vram"])
@pytest.mark.parametrize(
    ("settings", "smaller"),
    [
        ({"context": 8192, "dense_codec": "nf4"}, {"context": 3072, "dense_codec": "nf4"}),
        ({"dense_codec": "bf16"}, {"dense_codec": "int8"}),
        ({"codec": "int8", "dense_codec": "nf4"}, {"codec": "nf4", "dense_codec": "nf4"}),
    ],
    ids=["context", "dense codec", "codec"],
)
def test_every_remedy_makes_it_fit(
    mixtral: ModelShape, vram: int, settings: dict[str, object], smaller: dict[str, object]
) -> None:
    """With exactly the memory that a smaller setting needs, that setting is one of the remedies."""
    machine = Machine(vram_bytes=vram, ram_bytes=64 * GIB)
    fast = look_ahead(task(mixtral, machine, **smaller)).placement.fast
    tight = replace(machine, **{f"{fast.name.lower()}_bytes": fast.least_bytes})
    planned = task(mixtral, tight, **settings)
    (shortfall,) = find_shortfalls(planned, look_ahead(planned))
    (changed,) = {(name, value) for name, value in smaller.items() if settings.get(name) != value}
    flags = [remedy.split()[:2] for remedy in shortfall.remedies]
    assert [f"--{changed[0].replace('_', '-')}", str(changed[1])] in flags
    assert [flag for flag, _ in flags][-1] == f"--{fast.name.lower()}"
    for remedy in shortfall.remedies:
        assert look_ahead(apply(planned, remedy)).placement.fits, remedy


def apply(planned: Task, remedy: str) -> Task:
    match = re.match(r"--(\S+) (\S+)", remedy)
    assert match is not None
    flag, value = match.groups()
    if flag in ("ram", "vram"):
        return replace(planned, machine=replace(planned.machine, **{f"{flag}_bytes": parse_size(value)}))
    name = flag.replace("-", "_")
    return replace(planned, settings=replace(planned.settings, **{name: int(value) if flag == "context" else value}))


def test_the_context_that_is_proposed_is_the_longest(mixtral: ModelShape) -> None:
    planned = task(mixtral, Machine(vram_bytes=4 * GIB, ram_bytes=64 * GIB), context=16384)
    (shortfall,) = find_shortfalls(planned, look_ahead(planned))
    (context,) = [int(remedy.split()[1]) for remedy in shortfall.remedies if remedy.startswith("--context")]
    longer = replace(planned, settings=replace(planned.settings, context=context + 1024))
    assert not look_ahead(longer).placement.fits


def test_the_disk_must_hold_the_download_and_the_store(mixtral: ModelShape) -> None:
    machine = Machine(ram_bytes=32 * GIB, disk_bytes=100 * GIB)
    planned = replace(task(mixtral, machine), download_bytes=87 * GIB)
    (shortfall,) = find_shortfalls(planned, look_ahead(planned))
    stored = store_bytes(mixtral, "nf4", "bf16")
    assert shortfall.memory == "disk"
    assert shortfall.missing_bytes == stored + 87 * GIB - 100 * GIB
    assert shortfall.remedies == (f"{format_size(shortfall.missing_bytes)} more free space",)
    assert look_ahead(replace(planned, is_store=True, download_bytes=0)).placement.fits


def test_shards_that_are_deleted_on_the_way_need_less_disk(mixtral: ModelShape) -> None:
    needed = store_bytes(mixtral, "nf4", "bf16") + 2 * 5 * GIB
    for disk_bytes, num_remedies in ((needed, 2), (needed - 1, 1)):
        machine = Machine(ram_bytes=32 * GIB, disk_bytes=disk_bytes)
        planned = replace(task(mixtral, machine), download_bytes=87 * GIB, shard_bytes=5 * GIB)
        (shortfall,) = find_shortfalls(planned, look_ahead(planned))
        assert len(shortfall.remedies) == num_remedies
    assert look_ahead(replace(planned, download_bytes=0)).placement.fits


def test_measured_memory_is_used_where_none_is_named() -> None:
    here = measure_machine(vram=0)
    assert here.ram_bytes > 0
    assert here.disk_bytes is not None
    described = measure_machine(vram=12 * GIB, ram=64 * GIB)
    assert described == Machine(vram_bytes=12 * GIB, ram_bytes=64 * GIB, disk_bytes=None)
