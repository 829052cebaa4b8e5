"""Recording with a device tier above RAM, on a simulated accelerator."""

import dataclasses
from typing import Any

import pytest
from support.offload import offload
from support.pressure import scheduler_of
from support.tiny_models import tiny_model, tiny_prompt

from offload_moe.checkpoint.experts import ExpertsModule, find_experts
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.profile.costs import costs
from offload_moe.profile.recorder import RecordedTier, Subject, record
from offload_moe.profile.trace import HIT, MISS, Trace
from offload_moe.residency.counters import Counters
from offload_moe.residency.hierarchy import Hierarchy

NUM_RAM, NUM_DEVICE = 14, 5


def subject_of(model: Any, layers: list[ExpertsModule]) -> tuple[Subject, Hierarchy]:
    found = [
        dataclasses.replace(layer, module=model.get_submodule(layer.name)) for layer in layers
    ]  # the attached copy has no expert parameters to be found by
    device = scheduler_of(model)
    hierarchy: Hierarchy = model.hierarchy
    tiers = (
        RecordedTier(name="vram", scheduler=device, bytes_field="h2d_bytes"),
        RecordedTier(name="ram", scheduler=hierarchy.ram, bytes_field="disk_bytes"),
    )
    return Subject(hf=model, layers=found, tiers=tiers, metadata={}), hierarchy


@pytest.fixture(scope="module")
def run() -> tuple[Trace, Counters, Counters, list[int], list[int]]:
    """A trace, what the counters of both tiers say, and the tokens with and without recording."""
    original = tiny_model("qwen3_moe")
    model, _ = offload(original, "nf4", NUM_RAM, SimulatedCopier(), NUM_DEVICE)
    subject, hierarchy = subject_of(model, find_experts(original))
    ids, _ = tiny_prompt(1, 1)

    def say() -> list[int]:
        out = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
        return out[0].tolist()

    before = say()
    device, ram = hierarchy.counters.copy(), hierarchy.ram.counters.copy()
    with record(subject) as recorder:
        during = say()
    used = hierarchy.counters.since(device), hierarchy.ram.counters.since(ram)
    hierarchy.close()
    return recorder.trace(), *used, before, during


def test_tokens_stay(run: Any) -> None:
    assert run[3] == run[4]


def test_a_slower_tier_is_asked_for_what_the_faster_one_missed(run: Any) -> None:
    trace, device, ram = run[:3]
    fast, slow = trace.outcomes[..., 0], trace.outcomes[..., 1]
    assert (fast == MISS).sum() == device.num_misses
    assert (fast == HIT).sum() == device.num_hits
    assert (slow[fast == HIT] == HIT).all()
    assert (slow == MISS).sum() == ram.num_misses > 0
    assert (fast == MISS).sum() == ram.num_hits + ram.num_delayed_hits + ram.num_misses


def test_the_waiting_of_compute_is_split_and_complete(run: Any) -> None:
    trace, device, _ = run[:3]
    assert trace.stall_s.sum() == pytest.approx(device.stall_s)
    assert (trace.stall_s >= 0).all()
    assert (trace.stall_s.sum(axis=(0, 1)) > 0).all()


def test_bytes_of_each_tier(run: Any) -> None:
    trace, device, _ = run[:3]
    assert trace.loaded_bytes.sum(axis=(0, 1)).tolist() == [device.h2d_bytes, device.disk_bytes]


def test_the_report_has_both_tiers(run: Any) -> None:
    found = costs(run[0])
    assert found is not None
    vram, ram = found.total.tiers
    decoded = run[0].outcomes[1:]
    assert vram.hit_rate == pytest.approx((decoded[..., 0] == HIT).mean())
    asked = decoded[decoded[..., 0] == MISS][..., 1]
    assert ram.miss_rate == pytest.approx((asked == MISS).mean())
    assert found.time.token_s == pytest.approx(
        found.time.experts_s + sum(found.time.stall_s.values()) + found.time.rest_s + found.time.between_s
    )


def test_what_the_cpu_computed_is_in_the_trace() -> None:
    original = tiny_model("qwen3_moe")
    copier = SimulatedCopier(latency_s=0.005)
    model, _ = offload(original, "nf4", NUM_RAM, copier, NUM_DEVICE, DeviceArithmetic, hybrid="on")
    subject, hierarchy = subject_of(model, find_experts(original))
    with record(subject) as recorder:
        model.generate(input_ids=tiny_prompt(1, 1)[0], max_new_tokens=20, do_sample=False, eos_token_id=None)
    hierarchy.close()
    trace = recorder.trace()
    assert trace.computed_on_cpu is not None
    assert trace.outcomes is not None
    assert trace.computed_on_cpu.sum() == hierarchy.counters.num_computed_on_cpu > 0
    assert (trace.outcomes[trace.computed_on_cpu, 0] == MISS).all()
    assert (trace.outcomes[..., 0] == MISS).sum() == hierarchy.counters.num_misses
