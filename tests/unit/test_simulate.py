"""Simulated answers: by hand, against the replay, and between the bounds."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offload_moe.errors import ConfigError
from offload_moe.profile.behaviour import overlap
from offload_moe.profile.replay import replay
from offload_moe.profile.trace import Trace
from offload_moe.residency.keys import ExpertKeys
from offload_moe.simulate import (
    DiskModel,
    LinkModel,
    LookaheadModel,
    RunCosts,
    Simulation,
    VirtualPools,
    answers_of,
    simulate,
    synthetic_trace,
)
from offload_moe.simulate.hardware import CARDS, card_named, link_bytes_per_s

LAYERS, EXPERTS, TOP_K, RECORD = 4, 16, 2, 1_000_000
COSTS = RunCosts(token_host_s=1e-3, layer_host_s=2e-4, dense_s=3e-4, wave_host_s=1e-4, expert_s=4e-4)
DISK = DiskModel(bytes_per_s=1e9, latency_s=1e-4)


@pytest.fixture(scope="module")
def trace() -> Trace:
    drawn = synthetic_trace(num_experts=[EXPERTS] * LAYERS, top_k=TOP_K, num_tokens=60, num_sequences=2)
    return replace(drawn, experts=np.sort(drawn.experts))  # the runtime acquires ascending, a replay as it finds them


def pools(share: float, policy: str = "lru", device_share: float = 0.0) -> VirtualPools:
    num_all = LAYERS * EXPERTS
    return VirtualPools(
        keys=ExpertKeys([EXPERTS] * LAYERS),
        slot_bytes=RECORD,
        num_ram_slots=round(share * num_all),
        num_device_slots=round(device_share * num_all),
        policy=policy,
    )


def run(trace: Trace, chosen: VirtualPools, costs: RunCosts = COSTS, **others: Any) -> Simulation:
    return simulate(answers_of(trace, prompt_tokens=0), chosen, costs, DISK, **others)


def test_a_token_with_everything_resident_by_hand(trace: Trace) -> None:
    result = run(trace, pools(1.0), num_warm_up=1)
    warm = simulate(answers_of(trace, prompt_tokens=0) * 2, pools(1.0), COSTS, DISK, num_warm_up=3)
    assert warm.token_s == pytest.approx(1e-3 + LAYERS * (2e-4 + 3e-4 + 1e-4 + TOP_K * 4e-4))
    assert warm.decode_tokens_per_s == pytest.approx(1 / warm.token_s)
    assert (warm.hit_rate, warm.stall_s, warm.disk_bytes) == (1, 0, 0)
    assert result.token_s >= warm.token_s


def test_a_prompt_reads_each_expert_once_and_computes_by_its_tokens(trace: Trace) -> None:
    answers = answers_of(trace, prompt_tokens=30) * 2
    costs = replace(COSTS, pair_s=3e-4, dense_token_s=2e-4)
    result = simulate(answers, pools(1.0), costs, DISK, num_warm_up=2)
    expected = 0.0
    for answer in answers[2:]:
        expected += 1e-3 + LAYERS * (2e-4 + 30 * 2e-4 + 1e-4)
        for layer in range(LAYERS):
            counts = np.bincount(answer.prompt[:, layer].ravel())
            expected += sum(max(4e-4, count * 3e-4) for count in counts[counts > 0])
    assert result.num_prompt_tokens == 60
    assert result.prompt_tokens_per_s == pytest.approx(60 / expected)
    assert result.first_token_s == pytest.approx(expected / 2)


@pytest.mark.parametrize("policy", ["lru", "lfu", "knn"])
def test_hits_are_those_of_the_replay(trace: Trace, policy: str) -> None:
    result = run(trace, pools(0.4, policy))
    expected = replay(trace, policy, num_slots=pools(0.4).num_ram_slots)
    assert result.hit_rate == expected.hit_rate
    assert result.disk_bytes * result.num_decode_tokens == (expected.num_accesses - expected.num_hits) * RECORD


def test_a_token_lies_between_its_bounds(trace: Trace) -> None:
    link = LinkModel(bytes_per_s=10e9, latency_s=0.0)
    result = run(trace, pools(1.0, device_share=0.4), replace(COSTS, has_device=True), link=link, num_warm_up=1)
    transfer = result.h2d_bytes / 10e9
    compute = LAYERS * (3e-4 + TOP_K * 4e-4)
    host = 1e-3 + LAYERS * (2e-4 + 1e-4)
    assert max(transfer, compute) < result.token_s < host + 2 * LAYERS * 1e-4 + compute + transfer + result.stall_s
    assert result.ram_hit_rate is not None
    assert result.h2d_bytes > 0


def test_more_slots_and_a_faster_disk_are_faster(trace: Trace) -> None:
    speeds = [run(trace, pools(share)).decode_tokens_per_s for share in (0.1, 0.4, 0.8)]
    assert speeds == sorted(speeds)
    slow = simulate(answers_of(trace, prompt_tokens=0), pools(0.4), COSTS, replace(DISK, bytes_per_s=2e8))
    assert slow.decode_tokens_per_s < speeds[1]


def test_slots_come_and_go_with_the_context(trace: Trace) -> None:
    asked: list[tuple[int, int]] = []

    def slots_for(num_tokens: int, num_new: int) -> int:
        asked.append((num_tokens, num_new))
        return 40 if num_tokens <= 30 else 10

    answers = answers_of(trace, prompt_tokens=20)
    result = simulate(answers, pools(10 / 64), COSTS, DISK, chunk_tokens=16, slots_for=slots_for)
    assert asked[:4] == [(16, 16), (20, 4), (21, 1), (22, 1)]
    few, many = (simulate(answers, pools(count / 64), COSTS, DISK, chunk_tokens=16) for count in (10, 40))
    assert few.hit_rate < result.hit_rate < many.hit_rate
    passes = simulate(answers, pools(10 / 64), replace(COSTS, has_token_passes=True), DISK, slots_for=slots_for)
    assert few.hit_rate < passes.hit_rate < many.hit_rate


def test_one_slot_is_enough(trace: Trace) -> None:
    result = run(trace, replace(pools(1.0), num_ram_slots=1))
    assert result.hit_rate < 0.1
    assert result.disk_bytes > 0.9 * LAYERS * TOP_K * RECORD


def test_a_perfect_lookahead_hides_reads_behind_slow_layers(trace: Trace) -> None:
    costs = replace(COSTS, layer_host_s=4e-3)
    plain = run(trace, pools(0.5), costs, num_warm_up=1)
    ahead = run(trace, pools(0.5), costs, lookahead=LookaheadModel(recall=(1.0, 1.0)), num_warm_up=1)
    assert ahead.num_useful_prefetches > 0
    assert ahead.stall_s < 0.7 * plain.stall_s


def test_the_same_call_gives_the_same_result(trace: Trace) -> None:
    first, second = (run(trace, pools(0.4), lookahead=LookaheadModel(recall=(0.7,))) for _ in range(2))
    assert first == second


def test_what_a_trace_says_of_prompts_is_taken(trace: Trace) -> None:
    is_prompt = np.zeros(trace.num_tokens, dtype=bool)
    is_prompt[:7] = is_prompt[60:65] = True
    answers = answers_of(replace(trace, is_prompt=is_prompt), num_tokens=60)
    assert [(len(answer.prompt), len(answer.decode)) for answer in answers] == [(7, 53), (5, 7)]
    with pytest.raises(ConfigError, match="only prompts"):
        answers_of(trace, prompt_tokens=60)


def test_synthetic_routing_is_as_uneven_and_as_sticky_as_asked() -> None:
    shape = {"num_experts": [32] * 4, "top_k": 4, "num_tokens": 400}
    even, uneven = (synthetic_trace(**shape, skew=skew, reuse=0.0) for skew in (0.0, 1.0))
    sticky = synthetic_trace(**shape, skew=0.0, reuse=0.6)
    loads = [np.sort(np.bincount(t.experts[:, 0].ravel(), minlength=32))[::-1] for t in (even, uneven)]
    assert loads[0][0] < 1.6 * loads[0].mean()
    assert loads[1][0] > 3 * loads[1].mean()
    kept = overlap(sticky)
    assert kept is not None
    assert np.mean(kept.adjacent) == pytest.approx(0.6 + 0.4 * 1.6 / 29.6, abs=0.03)  # or drawn again by chance


def test_cards_and_links() -> None:
    assert card_named("GeForce-RTX-4090") is CARDS["rtx-4090"]
    assert link_bytes_per_s("4x16") == pytest.approx(25.2e9, rel=0.01)
    assert link_bytes_per_s("21.5") == 21.5e9
    assert all(card.source and card.memory_gbps > 100 for card in CARDS.values())
    for wrong in ("6x16", "-3", "fast"):
        with pytest.raises(ConfigError, match="--pcie"):
            link_bytes_per_s(wrong)
    with pytest.raises(ConfigError, match="rtx-4090"):
        card_named("rtx-9999")
