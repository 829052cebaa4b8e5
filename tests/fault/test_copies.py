"""Races between copies and compute, on the simulated accelerator, with every operation of the model deferred.

Each timing is the worst for one kind of forgotten wait: late copies for compute that does not wait for its bytes, late
compute for copies that do not wait for the last reader. `scripts/delete_waits` proves that none is forgotten here.
"""

import random
import threading
from collections.abc import Callable

import pytest
import torch
from support.deferred import DeferredCompute, fetch_top_k_after_waiting
from support.offload import offload
from support.pressure import bound_of, experts_of, generate, is_loading, overwrite_what_was_released, scheduler_of
from support.tiny_models import tiny_model, tiny_prompt
from torch import Tensor
from transformers import PreTrainedModel

from offload_moe.checkpoint.experts import find_experts
from offload_moe.errors import TransferError
from offload_moe.experts import routing
from offload_moe.experts.attach import SpannedLayers
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.experts.lookahead import Lookahead
from offload_moe.experts.probe import PlainRouter, find_probes
from offload_moe.families.cache_name import cache_from, with_cache
from offload_moe.memory import copier as copier_module
from offload_moe.memory.copier import Copier
from offload_moe.memory.page_lock import PageLock
from offload_moe.memory.simulated import SimulatedCopier, SimulatedStream
from offload_moe.residency.prefetch import PrefetchGovernor

POOLS = [(1, 1), (1, 4), (3, 2), (5, 9), (24, 24)]

draw = random.Random(0)


def rarely(delay_s: float) -> Callable[[], float]:
    return lambda: delay_s * draw.random() if draw.random() < 0.02 else 0.0


TIMINGS: dict[str, Callable[[], SimulatedCopier]] = {
    "late copies": lambda: SimulatedCopier(latency_s=0, lazy_copies=True, defers_compute=True),
    "late compute": lambda: SimulatedCopier(latency_s=0, lazy_compute=True, defers_compute=True),
    "late both": lambda: SimulatedCopier(latency_s=0, lazy_copies=True, lazy_compute=True, defers_compute=True),
    "random": lambda: SimulatedCopier(delay_s=lambda: draw.random() * 0.001, defers_compute=True),
}


@pytest.fixture(autouse=True)
def _ids_are_fetched_by_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "fetch_top_k", fetch_top_k_after_waiting)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3_moe")


def generate_later(model: PreTrainedModel, copier: SimulatedCopier, seed: int = 0) -> Tensor:
    with DeferredCompute(copier.current_stream(), rarely(0.002)):
        return generate(model, seed=seed)


def attach_to(
    model: PreTrainedModel, copier: Copier, pools: tuple[int, int]
) -> tuple[PreTrainedModel, PreTrainedModel]:
    attached, oracle = offload(model, "bf16", pools[0], copier, pools[1], DeviceArithmetic)
    overwrite_what_was_released(attached)
    return attached, oracle


@pytest.mark.parametrize("pools", POOLS, ids=str)
@pytest.mark.parametrize("timing", TIMINGS)
def test_the_same_bits_at_any_timing(model: PreTrainedModel, timing: str, pools: tuple[int, int]) -> None:
    copier = TIMINGS[timing]()
    attached, oracle = attach_to(model, copier, pools)
    assert torch.equal(generate_later(attached, copier), generate(oracle))
    scheduler_of(attached).close()


@pytest.mark.parametrize("timing", TIMINGS)
def test_the_same_bits_through_a_staging_ring(
    model: PreTrainedModel, timing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier_module, "STAGING_BYTES", 4096)
    copier = TIMINGS[timing]()
    copier._page_lock = PageLock(None)
    attached, oracle = attach_to(model, copier, (3, 4))
    assert torch.equal(generate_later(attached, copier), generate(oracle))
    assert len(copier._ring) == copier_module.NUM_STAGING_BUFFERS
    scheduler_of(attached).close()


@pytest.mark.parametrize("timing", TIMINGS)
def test_two_threads_with_streams_of_their_own(model: PreTrainedModel, timing: str) -> None:
    copier = TIMINGS[timing]()
    attached, oracle = offload(model, "bf16", 3, copier, 5, DeviceArithmetic)
    expected = [generate(oracle, seed=seed) for seed in range(2)]
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        stream = SimulatedStream(is_lazy="compute" in timing or "both" in timing)
        with stream:
            found[seed] = generate_later(attached, copier, seed)
        stream.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(2))
    scheduler_of(attached).close()


def test_lookahead_costs_no_synchronization_of_its_own(model: PreTrainedModel) -> None:
    copier = TIMINGS["late both"]()
    attached, oracle = offload(model, "bf16", 24, copier, 20, DeviceArithmetic)
    scheduler, layers = scheduler_of(attached), experts_of(attached)
    lookahead = Lookahead(find_probes(attached, find_experts(model)), scheduler, PrefetchGovernor(), 2)
    for bound in bound_of(attached):
        bound.lookahead = lookahead
    counts: list[int] = []

    def last_logits(model: PreTrainedModel, count: Callable[[], None]) -> Tensor:
        tokens = tiny_prompt(1, 9)[0]
        out = model(input_ids=tokens[:, :4], use_cache=True)
        for place in range(4, 9):
            count()
            out = model(input_ids=tokens[:, place : place + 1], **with_cache(cache_from(out)), use_cache=True)
        count()
        return out.logits

    with torch.inference_mode():
        with DeferredCompute(copier.compute) as mode:
            found = last_logits(attached, lambda: counts.append(mode.num_synchronizations))
        assert torch.equal(found, last_logits(oracle, lambda: None))
    assert counts[-1] - counts[-2] == len(layers)  # the first token tries the probes, which looks at values
    assert scheduler.counters.num_prefetches > 0
    ways = [way for probe in lookahead._probes if probe is not None for way in probe._routes.values()]
    assert any(isinstance(way, PlainRouter) for way in ways)
    scheduler.close()


def test_a_stalled_link_ends_an_answer_instead_of_the_session(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute that follows a stalled copy never ends: whoever waited for its routed ids would wait for ever."""
    copier, link_works = TIMINGS["random"](), threading.Event()
    attached, oracle = offload(model, "bf16", 24, copier, 9, DeviceArithmetic)
    expected = generate(oracle)
    scheduler, issue_copy = scheduler_of(attached), copier.issue_copy

    def stall(source: Tensor, destination: Tensor) -> None:
        copier.current_stream().issue(lambda: link_works.wait(20) and None)
        issue_copy(source, destination)

    monkeypatch.setattr(copier, "issue_copy", stall)
    scheduler.stall_limit_s = 0.2
    try:
        with pytest.raises(TransferError, match="did not arrive within"), DeferredCompute(copier.compute) as mode:
            mode.ends_without_waiting = True
            generate(attached)
    finally:
        link_works.set()
    scheduler.stall_limit_s = 60
    assert torch.equal(generate_later(attached, copier), expected)
    scheduler.close()


def test_a_recorded_layer_ends_with_its_copies_landed(model: PreTrainedModel) -> None:
    copier = TIMINGS["random"]()
    attached, _ = offload(model, "bf16", 24, copier, 3, DeviceArithmetic)
    landed = []

    class Recorder:
        def begin(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor) -> None: ...

        def end(self) -> None:
            landed.append(not is_loading(scheduler_of(attached)))

        def ran(self, layers: SpannedLayers) -> None: ...

    for bound in bound_of(attached):
        bound.recorder = Recorder()
    generate_later(attached, copier)
    assert len(landed) > 3
    assert all(landed)
    scheduler_of(attached).close()


def test_the_fixture_is_sharp(model: PreTrainedModel) -> None:
    """Deferred results are not there before somebody waits, and the ids are fetched once per MoE layer."""
    copier = TIMINGS["late compute"]()
    attached, oracle = offload(model, "bf16", 24, copier, 24, DeviceArithmetic)
    ids, _ = tiny_prompt(1, 5)  # without its mask: transformers looks at the values of a mask on the host
    with torch.inference_mode():
        with DeferredCompute(copier.compute) as mode:
            logits = attached(input_ids=ids).logits
            early = logits.numpy().copy()
            num_synchronizations = mode.num_synchronizations
        assert torch.equal(logits, oracle(input_ids=ids).logits)
    assert torch.tensor(early).isnan().all()
    assert num_synchronizations == len(experts_of(attached))
    scheduler_of(attached).close()
