"""Simulated passes of a card: by hand, and by the rules of its slots."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offload_moe.plan import Machine, make_plan
from offload_moe.plan.simulation import simulate_plan
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import LRU
from offload_moe.simulate import DiskModel, LinkModel, PassCosts, RunCosts, VirtualPools
from offload_moe.simulate.runtime import VirtualRuntime
from tests.support.plan import CONFIGS, GIB

LAYERS, EXPERTS = 2, 8
PASSES = PassCosts(token_s=1e-3, queued_nodes_s=4e-5, stepwise_nodes_s=3e-5, take_s=1e-6, step_s=5e-5, stop_s=5e-4)
COSTS = RunCosts(has_device=True, dense_s=1e-4, expert_s=1e-5, device_pass=replace(PASSES, fetch_s=2e-4, cpu_s=3e-4))
RECORD = 1_000_000


def runtime(num_slots: int, costs: RunCosts = COSTS, *, num_ram: int = LAYERS * EXPERTS) -> VirtualRuntime:
    pools = VirtualPools(
        keys=ExpertKeys([EXPERTS] * LAYERS), slot_bytes=RECORD, num_ram_slots=num_ram, num_device_slots=num_slots
    )
    disk, link = DiskModel(bytes_per_s=1e9, latency_s=0.0), LinkModel(bytes_per_s=25e9, latency_s=0.0)
    made = VirtualRuntime(pools, costs, disk, link)
    every = np.tile(np.arange(EXPERTS)[:, None, None], (1, LAYERS, 1))
    if num_ram == pools.keys.total:
        made.forward(every)  # a prompt brings all experts to RAM, and the last ones to the card
    return made


def token(*chosen: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The experts of each layer."""
    return np.array([chosen])


def passed(made: VirtualRuntime, mode: Any, *tokens: np.ndarray[Any, Any]) -> list[float]:
    assert made.card is not None
    made.card.mode.mode = mode
    return [made.forward(each) for each in tokens]


def test_a_resident_token_by_hand() -> None:
    for mode, before in (("queued", 4e-5), ("stepwise", 8e-5)):
        made = runtime(16)
        (seconds,) = passed(made, mode, token((0, 1), (2, 3)))
        assert seconds == pytest.approx(1e-3 + 2 * (1e-4 + before + 2e-5))
        assert made.scheduler.counters.h2d_bytes == 16 * RECORD  # of the prompt


def test_misses_are_fetched_beside_hits_and_stay() -> None:
    made = runtime(4)
    chosen = token((0, 1), (0, 1))
    first, second = passed(made, "queued", chosen, chosen)
    assert second == pytest.approx(1e-3 + 2 * (1e-4 + 4e-5 + 2e-5))
    assert first == pytest.approx(1e-3 + 2 * (1e-4 + 4e-5 + 2 * (2e-4 + 1e-5)))
    (third,) = passed(made, "queued", token((0, 5), (0, 1)))
    assert third == pytest.approx(second + (2e-4 + 1e-5) - 2e-5)


def test_the_slot_that_was_used_longest_ago_is_taken() -> None:
    made = runtime(4)
    passed(made, "queued", token((0, 1), (0, 1)), token((0, 2), (0, 1)))
    resident = set(made.scheduler.residency.resident_keys())
    assert resident == {0, 2, 8, 9}  # expert 1 of the first layer went


class Worths(LRU):
    """Gives numbers that a test sets."""

    def __init__(self, num_keys: int) -> None:
        super().__init__()
        self.worths = np.zeros(num_keys, np.float32)


def with_worths(num_slots: int) -> tuple[VirtualRuntime, Worths]:
    """A runtime whose policy gives worths, with experts 0 and 1 of both layers in its first four slots."""
    made = runtime(num_slots)
    policy = made.scheduler.residency.policy = Worths(LAYERS * EXPERTS)
    for key in made.scheduler.residency.resident_keys():
        policy.insert(key)
    passed(made, "queued", token((0, 1), (0, 1)))
    return made, policy


def test_what_is_worth_least_goes_before_what_is_older() -> None:
    made, policy = with_worths(6)
    passed(made, "queued", token((2, 3), (0, 1)))  # 2 and 3 of layer 0 are the newest there
    policy.worths[[0, 1, 8, 9]] = 0.9
    policy.worths[[2, 3]] = [0.2, 0.1]
    passed(made, "queued", *[token((0, 1), (0, 1))] * 2)  # one pass until they count, and neither is of late
    passed(made, "queued", token((4, 0), (0, 1)))
    assert set(made.scheduler.residency.resident_keys()) == {0, 1, 2, 4, 8, 9}


def test_worths_count_one_pass_later() -> None:
    made, policy = with_worths(6)
    passed(made, "queued", token((2, 3), (0, 1)), *[token((0, 1), (0, 1))] * 2)
    policy.worths[[0, 1, 2, 8, 9]] = 0.9
    passed(made, "queued", token((4, 0), (0, 1)))
    assert 2 not in made.scheduler.residency.resident_keys()  # the older one of 2 and 3, as all are worth nothing yet


def test_what_was_used_since_the_layers_last_turn_goes_last() -> None:
    made, policy = with_worths(5)
    policy.worths[[8, 9]] = 0.9
    policy.worths[[0, 1, 2]] = 0.1
    passed(made, "queued", *[token((0, 1), (0, 1))] * 2)
    passed(made, "queued", token((0, 1), (2, 3)))  # nothing but what this pass and the last one used is there
    assert {0, 1, 10, 11} <= set(made.scheduler.residency.resident_keys())


def test_the_cpu_computes_misses_and_changes_no_slot() -> None:
    made = runtime(4)
    passed(made, "queued", token((0, 1), (0, 1)))
    before = made.scheduler.residency.resident_keys()
    (seconds,) = passed(made, "stepwise", token((0, 5), (0, 1)))
    assert seconds == pytest.approx(1e-3 + 2 * (1e-4 + 8e-5) + 1e-6 + 3e-4 + 2e-5)
    assert made.scheduler.residency.resident_keys() == before
    assert made.scheduler.counters.num_computed_on_cpu == 1


def test_a_queued_pass_stops_for_the_disk_and_a_stepwise_one_reads_beside_hits() -> None:
    for mode, extra in (("queued", 5e-4 + 1e-3 + 2e-4 + 1e-5), ("stepwise", 5e-4 + 1e-3 + 3e-4 + 1e-6)):
        made = runtime(8, num_ram=12)
        (cold, warm) = passed(made, mode, token((3,), (4,)), token((3,), (4,)))
        before = 1e-4 + (4e-5 if mode == "queued" else 8e-5)
        assert cold == pytest.approx(1e-3 + 2 * (before + extra))
        assert warm < cold - 2e-3
        assert made.ram.counters.disk_bytes == 2 * RECORD


def test_more_experts_than_slots_are_the_cpus() -> None:
    made = runtime(1)
    (seconds,) = passed(made, "queued", token((0, 1), (2, 3)))
    assert seconds == pytest.approx(1e-3 + 2 * (1e-4 + 8e-5 + 1e-6 + 6e-4))
    assert made.scheduler.counters.num_computed_on_cpu == 4


def test_the_faster_mode_is_found() -> None:
    """A link that is slower than the CPU, and the other way round."""
    for fetch_s, cpu_s, share in ((5e-3, 1e-4, 0.9), (1e-4, 5e-3, 0.0)):
        costs = replace(COSTS, device_pass=replace(PASSES, fetch_s=fetch_s, cpu_s=cpu_s))
        made = runtime(4, costs)
        assert made.card is not None
        tokens = [token((step % 8, (step + 3) % 8), (step % 7, 7)) for step in range(120)]
        for each in tokens:
            made.forward(each)
        assert abs(made.card.num_stepwise / made.card.num_passes - share) < 0.1


def test_the_plan_and_the_simulation_agree_where_nothing_is_missed() -> None:
    machine = Machine(ram_bytes=64 * GIB, vram_bytes=64 * GIB)
    plan = make_plan(str(CONFIGS / "Mixtral-8x7B-v0.1.json"), machine, context=1024)
    assert plan.speed is not None
    assert plan.speed.forecasts[0].way == "queued"
    simulation = simulate_plan(plan, prompt_tokens=64, num_tokens=12, reuse=1.0)
    assert simulation.result.hit_rate == 1
    assert simulation.result.stepwise_rate == 0
    assert simulation.result.token_s == pytest.approx(plan.speed.forecasts[0].token_s, rel=1e-4)
