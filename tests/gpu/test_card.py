"""The device tier on a real card, in one command: ``pytest -m gpu tests/gpu``. Mirrors the simulated races."""

import random
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from support.offload import offload
from support.pressure import experts_of, generate, overwrite_what_was_released, scheduler_of
from support.tiny_models import FAMILIES, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from offload_moe.experts import routing
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.memory.arena import Arena
from offload_moe.memory.copier import AcceleratorCopier, CudaRuntime, compute_device, free_device_memory
from offload_moe.memory.page_lock import PageLock

pytestmark = pytest.mark.gpu

POOLS = [(1, 1), (3, 2), (5, 9), (24, 24)]


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return compute_device()


@pytest.fixture(params=["page-locked", "staged"])
def copier(request: pytest.FixtureRequest, device: torch.device) -> Iterator[AcceleratorCopier]:
    copier = AcceleratorCopier(device, PageLock(None) if request.param == "staged" else None)
    yield copier
    copier.close()


def attach_on_card(
    family: str, codec: str, copier: AcceleratorCopier, pools: tuple[int, int], dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """With compute that is late: the card sleeps before each MoE layer, and everything released is overwritten."""
    attached, oracle = offload(tiny_model(family).to(dtype), codec, pools[0], copier, pools[1], DeviceArithmetic)
    for module in experts_of(attached):
        module.register_forward_pre_hook(lambda *_: torch.cuda._sleep(2_000_000))
    overwrite_what_was_released(attached)
    return attached.to("cuda"), oracle.to("cuda")


@pytest.mark.parametrize("pools", POOLS, ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_lossless_codec_gives_the_bits_of_eager(
    family: str, pools: tuple[int, int], copier: AcceleratorCopier
) -> None:
    attached, oracle = attach_on_card(family, "bf16", copier, pools, torch.bfloat16)
    assert torch.equal(generate(attached), generate(oracle))
    scheduler_of(attached).close()


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_quantized_codecs_follow_eager_and_depend_on_no_pool(
    family: str, codec: str, copier: AcceleratorCopier
) -> None:
    found = []
    for pools in POOLS:
        attached, oracle = attach_on_card(family, codec, copier, pools, torch.float32)
        found.append(generate(attached))
        scheduler_of(attached).close()
    assert all(torch.equal(logits, found[0]) for logits in found)
    torch.testing.assert_close(found[0], generate(oracle), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_the_host_waits_once_per_layer(
    num_tokens: int, copier: AcceleratorCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached, _ = offload(tiny_model("qwen3_moe").to(torch.bfloat16), "nf4", 24, copier, 24, DeviceArithmetic)
    experts = experts_of(attached)[0]
    hidden = torch.randn(num_tokens, 64, dtype=torch.bfloat16, device="cuda")
    weights, ids = torch.rand(num_tokens, 8, device="cuda").topk(3)
    expected = experts(hidden, ids, weights)  # loads what is needed
    fetch: Callable[[Tensor], routing.Ids] = routing.fetch_top_k
    fetched = fetch(ids)
    monkeypatch.setattr(routing, "fetch_top_k", lambda _: fetched)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = experts(hidden, ids, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)
    scheduler_of(attached).close()


def seconds(work: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def test_copies_run_beside_compute(device: torch.device) -> None:
    copier = AcceleratorCopier(device)
    arena = Arena(num_slots=4, slot_bytes=64 << 20)
    target = copier.allocate(64 << 20)
    matrix = torch.randn(4096, 4096, device=device)

    def copy() -> None:
        for index in range(4):
            copier.copy(arena.slot(index), target, after=())

    def compute() -> None:
        for _ in range(num_products):
            torch.mm(matrix, matrix)

    def both() -> None:
        compute()
        copy()

    num_products = 1
    seconds(both)  # warm up, and lock the pages
    copy_s = min(seconds(copy) for _ in range(5))
    num_products = max(1, round(copy_s / min(seconds(compute) for _ in range(5))))
    compute_s = min(seconds(compute) for _ in range(5))
    both_s = min(seconds(both) for _ in range(5))
    assert both_s < max(copy_s, compute_s) + 0.5 * min(copy_s, compute_s), (copy_s, compute_s, both_s)
    copier.close()


def test_what_is_locked_is_unlocked_and_a_refusal_breaks_no_launch(device: torch.device) -> None:
    runtime = CudaRuntime(device)
    arena = Arena(num_slots=2, slot_bytes=1 << 20)
    for _ in range(2):
        page_lock = PageLock(runtime)
        assert page_lock.holds(arena.slot(0))
        page_lock.close()
    assert runtime.register(0x1000, 4096) != 0
    assert torch.ones(10, device=device).sum().item() == 10


def test_copies_arrive_whole(copier: AcceleratorCopier) -> None:
    draw = random.Random(0)
    arena = Arena(num_slots=8, slot_bytes=9 << 20)
    target = copier.allocate(9 << 20)
    for index in range(8):
        arena.slot(index).copy_(torch.randint(0, 256, (9 << 20,), dtype=torch.uint8))
    for _ in range(20):
        source = arena.slot(draw.randrange(8))
        copier.copy(source, target, after=[copier.mark()]).wait()
        assert torch.equal(target.cpu(), source)


def test_free_memory_is_known(device: torch.device) -> None:
    free = free_device_memory(device)
    held = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    assert free - free_device_memory(device) >= held.numel() // 2
