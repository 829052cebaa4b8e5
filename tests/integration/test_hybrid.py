"""Misses shared between the link and the CPU, on the simulated accelerator: the numbers and the choice."""

import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.deferred import DeferredCompute, fetch_top_k_after_waiting
from support.offload import offload
from support.pressure import bound_of, generate, scheduler_of
from support.tiny_models import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from offload_moe.errors import ConfigError
from offload_moe.experts import hybrid, routing
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.experts.native import NativeArithmetic
from offload_moe.memory import pace
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.residency.counters import Counters
from offload_moe.residency.split import Balance, Split

RECORD_S = 0.01


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3_moe")


def run(
    model: PreTrainedModel, copier: SimulatedCopier, *, hybrid: Any, pools: tuple[int, int] = (24, 6), **options: Any
) -> tuple[Tensor, Counters]:
    attached, _ = offload(
        model, options.pop("codec", "nf4"), pools[0], copier, pools[1], DeviceArithmetic, hybrid=hybrid
    )
    found = generate(attached, **{"num_tokens": 8, **options})
    scheduler_of(attached).close()
    return found, scheduler_of(attached).counters


def cpu_that_takes(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = NativeArithmetic.outputs

    def slow(self: NativeArithmetic, hidden: Tensor, routing: Any, indices: list[int], records: list[Tensor]) -> Tensor:
        time.sleep(seconds * len(indices))
        return outputs(self, hidden, routing, indices, records)

    monkeypatch.setattr(NativeArithmetic, "outputs", slow)


def nothing_takes_time_in(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 0.0))


@pytest.mark.parametrize(
    ("codec", "pools"),
    [("nf4", (24, 6)), ("nf4", (2, 2)), ("nf4", (1, 1)), ("nf4", (5, 8)), ("int8", (24, 6)), ("bf16", (24, 6))],
)
def test_within_tolerance_of_off_and_the_same_tokens(
    model: PreTrainedModel, codec: str, pools: tuple[int, int]
) -> None:
    slow = SimulatedCopier(latency_s=0.001)
    found, counters = run(model, slow, hybrid="on", pools=pools, codec=codec)
    expected, _ = run(model, SimulatedCopier(latency_s=0), hybrid="off", codec=codec)
    assert counters.num_computed_on_cpu > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_off_is_bit_identical_whatever_the_link(model: PreTrainedModel) -> None:
    found, counters = run(model, SimulatedCopier(latency_s=0.001), hybrid="off", pools=(5, 2))
    expected, _ = run(model, SimulatedCopier(latency_s=0), hybrid="off", pools=(24, 24))
    assert counters.num_computed_on_cpu == 0
    assert torch.equal(found, expected)


def test_a_slow_link_leaves_misses_to_the_cpu(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_takes_time_in(hybrid, monkeypatch)
    _, counters = run(model, SimulatedCopier(latency_s=0.001), hybrid="auto", num_tokens=16)
    decode_misses = counters.num_misses - 24  # the prompt's are copied
    assert counters.num_computed_on_cpu > 0.6 * decode_misses


def test_a_slow_cpu_leaves_misses_to_the_link(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_that_takes(0.001, monkeypatch)
    nothing_takes_time_in(pace, monkeypatch)
    _, counters = run(model, SimulatedCopier(latency_s=0), hybrid="auto", num_tokens=16)
    assert 1 <= counters.num_computed_on_cpu < 0.05 * counters.num_misses  # those that measure it


def test_seconds_of_both_sides_and_what_was_predicted_are_counted(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real threads; how far the two are apart is held in virtual time, see `test_hybrid_balance.py`."""
    cpu_that_takes(RECORD_S, monkeypatch)
    _, counters = run(model, SimulatedCopier(latency_s=RECORD_S), hybrid="auto", pools=(24, 2), num_tokens=16)
    assert counters.cpu_s >= RECORD_S * counters.num_computed_on_cpu > 0
    assert counters.link_s >= RECORD_S
    assert counters.cpu_predicted_s >= RECORD_S
    assert counters.link_predicted_s >= RECORD_S


def test_experts_the_cpu_computed_come_later_while_the_link_is_idle(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU takes every miss, and yet those that are used again and again are on the device in the end."""
    monkeypatch.setattr(
        Balance, "split", lambda self, absent, arriving, unread, busy: Split(on_cpu=[*absent, *arriving, *unread])
    )
    attached, _ = offload(model, "nf4", 24, SimulatedCopier(latency_s=0.001), 24, DeviceArithmetic, hybrid="on")
    bound, scheduler = bound_of(attached)[0], scheduler_of(attached)
    counters, residency = scheduler.counters, scheduler.residency
    hidden, ids, weights = torch.randn(1, 64), torch.tensor([[0, 3, 5]]), torch.full((1, 3), 0.3)
    with torch.inference_mode():
        first = bound(hidden, ids, weights)
        for here in ([0], [0, 3], [0, 3, 5]):  # one at a time
            torch.testing.assert_close(bound(hidden, ids, weights), first, rtol=1e-4, atol=1e-5)
            with scheduler.changed:
                assert scheduler.changed.wait_for(lambda here=here: residency.resident_keys() == here, 60)
        before = counters.copy()
        bound(hidden, ids, weights)
    assert before.num_computed_on_cpu >= 3
    assert (before.num_prefetches, before.num_delayed_hits) == (0, 0)
    assert counters.since(before).num_computed_on_cpu == 0
    scheduler.close()


@pytest.mark.parametrize("lazy", ["copies", "compute"])
def test_no_race_with_the_cpus_share(model: PreTrainedModel, lazy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "fetch_top_k", fetch_top_k_after_waiting)
    outputs = NativeArithmetic.outputs

    def on_the_host(*arguments: Any) -> Tensor:
        with _disable_current_modes():  # the CPU's own operations are not issued to the device
            return outputs(*arguments)

    monkeypatch.setattr(NativeArithmetic, "outputs", on_the_host)
    copier = SimulatedCopier(latency_s=0.001, **{f"lazy_{lazy}": True})
    attached, oracle = offload(model, "bf16", 5, copier, 4, DeviceArithmetic, hybrid="on")
    with DeferredCompute(copier.current_stream()):
        found = generate(attached, num_tokens=6)
    torch.testing.assert_close(found, generate(oracle, num_tokens=6), rtol=1e-4, atol=1e-5)
    assert scheduler_of(attached).counters.num_computed_on_cpu > 0
    scheduler_of(attached).close()


def test_auto_leaves_a_lossless_store_alone(model: PreTrainedModel) -> None:
    _, counters = run(model, SimulatedCopier(latency_s=0.005), hybrid="auto", codec="bf16")
    assert counters.num_computed_on_cpu == 0


def test_on_without_a_kernel_that_fits_is_an_error(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.experts.arithmetic.recognize_activation", lambda *_, **__: None)
    with pytest.raises(
        ConfigError, match=r"cannot be computed on the CPU: no native kernel fits.*--hybrid auto or off"
    ):
        run(model, SimulatedCopier(), hybrid="on")
    run(model, SimulatedCopier(), hybrid="auto", num_tokens=1)
