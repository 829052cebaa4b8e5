"""Tokens that a native run takes through all layers, in virtual time: by hand, and against the layers one by one."""

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offload_moe.memory.reader import Reader
from offload_moe.native.kernels import DONE, DROPPED, READING, Reads, SlotTable
from offload_moe.residency.keys import ExpertKeys
from offload_moe.simulate import (
    Answer,
    DiskModel,
    LookaheadModel,
    RunCosts,
    Simulation,
    VirtualPools,
    answers_of,
    simulate,
    synthetic_trace,
)
from offload_moe.simulate.clock import VirtualClock, VirtualCondition
from offload_moe.simulate.disk import VirtualDisk
from offload_moe.simulate.reader import VirtualReader

LAYERS, EXPERTS, TOP_K, RECORD = 4, 32, 4, 1_000
COSTS = RunCosts(
    token_host_s=1e-3,
    layer_host_s=2e-4,
    dense_s=3e-4,
    wave_host_s=1e-4,
    expert_s=4e-4,
    has_token_passes=True,
    ask_host_s=2e-3,
)
DISK = DiskModel(bytes_per_s=1e12, latency_s=1e-4)
TRACE = synthetic_trace(num_experts=[EXPERTS] * LAYERS, top_k=TOP_K, num_tokens=60, num_sequences=2)


def run(share: float, costs: RunCosts = COSTS, disk: DiskModel = DISK, **others: Any) -> Simulation:
    pools = VirtualPools(
        keys=ExpertKeys([EXPERTS] * LAYERS),
        slot_bytes=RECORD,
        num_ram_slots=max(1, round(share * LAYERS * EXPERTS)),
    )
    return simulate(answers_of(TRACE, prompt_tokens=0), pools, costs, disk, **others)


def one_layer(tokens: list[list[int]], costs: RunCosts, num_warm_up: int) -> float:
    """Milliseconds of the last token of a model of one layer with 12 slots, of which one is reserved at a time."""
    pools = VirtualPools(keys=ExpertKeys([EXPERTS]), slot_bytes=RECORD, num_ram_slots=12)
    empty = np.zeros((0, 1, len(tokens[0])), dtype=np.int16)
    answers = [Answer(prompt=empty, decode=np.array([[experts]], dtype=np.int16)) for experts in tokens]
    return 1e3 * simulate(answers, pools, costs, DISK, num_warm_up=num_warm_up).token_s


def test_a_token_with_everything_resident_has_no_python_between_its_layers() -> None:
    answers = answers_of(TRACE, prompt_tokens=0) * 2
    pools = VirtualPools(keys=ExpertKeys([EXPERTS] * LAYERS), slot_bytes=RECORD, num_ram_slots=LAYERS * EXPERTS)
    warm = simulate(answers, pools, replace(COSTS, ask_host_s=0.0), DISK, num_warm_up=3)
    assert warm.token_s == pytest.approx(1e-3 + LAYERS * (2e-4 + 3e-4 + TOP_K * 4e-4))
    assert (warm.hit_rate, warm.stall_s) == (1, 0)


def test_what_cannot_be_fetched_is_asked_for_by_hand() -> None:
    # asked at 1.5 ms, when the slot that is to be reserved, one ask, comes at 3.0; heard after another ask, at 5.0
    # both reads come 0.1 later
    assert one_layer([[3, 5]], COSTS, 0) == pytest.approx(5.1 + 2 * 0.4)


def test_what_can_be_fetched_waits_for_nobody() -> None:
    quick = replace(COSTS, ask_host_s=1e-4)  # the slot is reserved at 1.1 ms, and asked for at 1.5
    tokens = [[3, 5], [5, 7]]
    fetched = one_layer(tokens, quick, 1)
    assert fetched == pytest.approx(1.5 + 0.4 + 0.4)  # 5 is computed while 7 is read
    late = replace(quick, partial_host_s=1e-4, late_host_s=2e-4)
    assert one_layer(tokens, late, 1) == pytest.approx(fetched + 0.1 + 0.2)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_every_miss_is_one_read(share: float) -> None:
    result = run(share)
    num_misses = result.num_decode_tokens * LAYERS * TOP_K * (1 - result.hit_rate)
    assert result.disk_bytes * result.num_decode_tokens == pytest.approx(num_misses * RECORD)


def test_lent_slots_cost_hits_and_few() -> None:
    passes, layers = run(0.5), run(0.5, replace(COSTS, has_token_passes=False))
    assert layers.hit_rate - 0.05 < passes.hit_rate < layers.hit_rate


def test_the_longer_an_ask_takes_the_slower_the_token() -> None:
    speeds = [run(0.3, replace(COSTS, ask_host_s=seconds)).decode_tokens_per_s for seconds in (4e-3, 1e-3, 1e-5)]
    assert speeds == sorted(speeds)
    slow_accounts = run(0.3, replace(COSTS, account_host_s=2e-3)).decode_tokens_per_s
    assert slow_accounts < run(0.3).decode_tokens_per_s


def test_with_too_few_slots_for_a_ride_layers_go_one_by_one() -> None:
    few = (2 * TOP_K - 1) / LAYERS / EXPERTS
    assert run(few) == run(few, replace(COSTS, has_token_passes=False))
    assert run(0.0).hit_rate < 0.1  # one slot


def test_guesses_are_fetched_by_the_ride() -> None:
    slow = {"costs": replace(COSTS, layer_host_s=4e-3, ask_host_s=1e-4), "disk": replace(DISK, latency_s=3e-3)}
    plain = run(0.9, **slow, num_warm_up=1)
    ahead = run(0.9, **slow, num_warm_up=1, lookahead=LookaheadModel(recall=(1.0,)))
    assert ahead.num_useful_prefetches > 0
    assert ahead.stall_s < plain.stall_s


def test_a_wrong_guess_that_is_not_being_read_leaves_its_slot_lent() -> None:
    clock, slot_table = VirtualClock(), SlotTable(8, 9)
    disk = VirtualDisk(clock, replace(DISK, num_readers=1), RECORD)
    reads = VirtualReader(slot_table, disk, VirtualCondition(clock))
    for slot in (7, 8):
        slot_table.reserve(slot)
        reads.reserve(slot)
    assert all(reads.fetch(key, is_prefetch=True) for key in (3, 4))
    assert not reads.fetch(5, is_prefetch=True)
    reads.drop_wrong(100, wanted=[])
    assert [(news.key, news.slot, news.state) for news in reads.completions()] == [
        (3, 8, READING),
        (4, 7, READING),
        (4, 7, DROPPED),
    ]
    assert (slot_table.slots[3], slot_table.slots[4]) == (8, -1)
    assert [*reads.reclaim()] == [7]
    clock.advance(1.0)
    assert [(news.key, news.state) for news in reads.completions()] == [(3, DONE)]
    assert slot_table.lease_arrived([3, 4]) == [3]
    assert not slot_table.vacate(8)


def test_the_same_call_gives_the_same_result() -> None:
    first, second = (run(0.4, lookahead=LookaheadModel(recall=(0.7,))) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", [name for name in vars(Reader) if not name.startswith("_")])
def test_virtual_reads_are_called_as_real_ones(name: str) -> None:
    asked, *kinds = (getattr(kind, name) for kind in (Reader, Reads, VirtualReader))
    if isinstance(asked, property):
        assert all(isinstance(kind, property) for kind in kinds)
        return
    wanted = inspect.signature(asked).parameters
    for kind in kinds:
        assert [*inspect.signature(kind).parameters] == [*wanted]
