"""The link and the CPU finish a layer's misses together: virtual time, so no noise of this machine enters.

The layer, the split, the lease, the residency and the estimates are the runtime's own. Copies and the CPU's kernel take
the seconds they are told to, on a virtual clock, and still move and compute real numbers.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.offload import offload
from support.pressure import bound_of, scheduler_of
from support.tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from offload_moe.experts import hybrid
from offload_moe.experts.device import DeviceArithmetic
from offload_moe.experts.native import NativeArithmetic
from offload_moe.memory import pace
from offload_moe.memory.mover import Arrived
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.residency.counters import Counters
from offload_moe.residency.hierarchy import Hierarchy
from offload_moe.residency.records import RamRecords
from offload_moe.simulate.clock import VirtualClock, VirtualCondition

NUM_EXPERTS, NUM_SLOTS, NUM_LAYERS = 16, 16, 3  # a layer's experts are gone when it is computed again
TOP_K, NUM_TOKENS = 8, 2
NUM_LEARNING = 2  # layers: one for the cost of a copy, one for that of the CPU
COSTS = [(1.0, 1.0), (1.0, 0.37), (1.0, 0.13), (0.29, 1.0), (0.11, 1.0)]  # seconds of an expert: link, CPU


class VirtualCopies:
    """A mover whose copies take their seconds one after another, on the virtual clock."""

    def __init__(self, hierarchy: Hierarchy, clock: VirtualClock, seconds: float) -> None:
        self._hierarchy, self._clock, self._free_at = hierarchy, clock, 0.0
        self.seconds = seconds

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        began = self._hierarchy.link.begin()
        self._free_at = max(self._free_at, self._clock.now) + self.seconds
        self._clock.at(self._free_at, partial(self._end, key, slot, began, arrived, is_prefetch))

    def promote(self, slot: int) -> None: ...

    def cancel(self, slot: int) -> bool:
        return False

    def drain(self) -> None: ...

    def used(self, slots: Sequence[int]) -> None: ...

    def close(self) -> None: ...

    def _end(self, key: int, slot: int, began: float, arrived: Arrived, is_prefetch: bool) -> None:
        hierarchy = self._hierarchy
        record, give_back = RamRecords(hierarchy.ram, hierarchy.arena).borrow(key)
        hierarchy.record_of(slot).copy_(record)
        give_back()
        hierarchy.link.end([began], are_demanded=not is_prefetch)
        arrived(slot, record.numel(), None)


class Machine:
    """A model on a virtual device beside a virtual CPU."""

    def __init__(self, model: PreTrainedModel, link_s: float, cpu_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.cpu_s = VirtualClock(), cpu_s
        self.draw, self.noise = random.Random(0), torch.Generator().manual_seed(0)
        num_keys = NUM_LAYERS * NUM_EXPERTS
        self.attached, self.oracle = offload(
            model, "nf4", num_keys, SimulatedCopier(), NUM_SLOTS, DeviceArithmetic, hybrid="on"
        )
        self.hierarchy: Hierarchy = self.attached.hierarchy
        for layer in range(NUM_LAYERS):
            with self.hierarchy.ram.acquire(layer, range(NUM_EXPERTS)) as lease:
                list(lease)
        scheduler = scheduler_of(self.attached)
        self.threads = scheduler.mover
        self.link = VirtualCopies(self.hierarchy, self.clock, link_s)
        scheduler.mover, scheduler.clock, scheduler.changed = self.link, self.clock, VirtualCondition(self.clock)
        for module in (hybrid, pace):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=self.clock))
        outputs = NativeArithmetic.outputs

        def slow(
            arithmetic: NativeArithmetic, hidden: Tensor, routing: Any, indices: list[int], records: Any
        ) -> Tensor:
            self.clock.advance(self.cpu_s * len(indices))
            return outputs(arithmetic, hidden, routing, indices, records)

        monkeypatch.setattr(NativeArithmetic, "outputs", slow)

    def compute(self, layer: int) -> tuple[Counters, float]:
        """One layer for a few tokens: what it added to the counters, and the seconds between one side's end and the
        other's. Where nothing is copied the link ends with what it was busy with before.
        """
        hidden = torch.randn(NUM_TOKENS, 64, generator=self.noise)
        chosen = [self.draw.sample(range(NUM_EXPERTS), TOP_K) for _ in range(NUM_TOKENS)]
        arguments = hidden, torch.tensor(chosen), torch.full((NUM_TOKENS, TOP_K), 0.3)
        counters, busy_s = scheduler_of(self.attached).counters, self.hierarchy.link.busy_s()
        before = counters.copy()
        with torch.inference_mode():
            experts = bound_of(self.attached)[layer]
            found = experts(*arguments)
            experts._balance.finish()
            expected = self.oracle.model.layers[layer].mlp.experts(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        added = counters.since(before)
        return added, abs(added.cpu_s - (added.link_s or busy_s))

    def close(self) -> None:
        self.threads.close()
        self.hierarchy.ram.close()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3_moe", num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, num_hidden_layers=NUM_LAYERS)


@pytest.fixture
def machine(
    model: PreTrainedModel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    machine = Machine(model, *request.param, monkeypatch)
    yield machine
    machine.close()


@pytest.mark.parametrize("idle_s", [0.0, 0.04, 10.0])  # between layers, while the link goes on
@pytest.mark.parametrize("machine", COSTS, ids=str, indirect=True)
def test_both_end_within_an_expert_of_each_other_as_predicted(machine: Machine, idle_s: float) -> None:
    link_s, cpu_s = machine.link.seconds, machine.cpu_s
    num_on_cpu = 0
    for number in range(NUM_LEARNING + 6 * NUM_LAYERS):
        found, apart_s = machine.compute(number % NUM_LAYERS)
        machine.clock.advance(idle_s)
        if number >= NUM_LEARNING:
            assert apart_s <= max(cpu_s, link_s) * (1 + 1e-9)
            assert found.cpu_s == pytest.approx(cpu_s * found.num_computed_on_cpu)
            assert found.cpu_predicted_s == pytest.approx(found.cpu_s)
            assert found.link_predicted_s == pytest.approx(found.link_s)
            num_on_cpu += found.num_computed_on_cpu
    assert 0 < num_on_cpu < scheduler_of(machine.attached).counters.num_misses


@pytest.mark.parametrize("machine", [(1.0, 0.5)], indirect=True)
def test_they_do_so_again_after_the_link_has_become_slower(machine: Machine) -> None:
    for number in range(4 * NUM_LAYERS):
        machine.compute(number % NUM_LAYERS)
    machine.link.seconds = 3.0
    found, apart_s = machine.compute(0)
    assert found.link_s > 2 * found.link_predicted_s
    assert apart_s > 3.0
    for number in range(1, 12 * NUM_LAYERS):
        found, apart_s = machine.compute(number % NUM_LAYERS)
    assert found.link_predicted_s == pytest.approx(found.link_s, rel=0.02)
    assert apart_s <= 3.0 * 1.02
