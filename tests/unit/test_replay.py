"""Replay: lease semantics by hand, pools, sizes, and a truncated real trace against published figures."""

import json
from pathlib import Path

import numpy as np
import pytest

from offload_moe.errors import ConfigError
from offload_moe.profile.belady import NEVER, next_uses
from offload_moe.profile.replay import parse_slots, replay, replay_report
from offload_moe.profile.trace import Trace, load_trace
from offload_moe.residency.policy import policy_names

REAL = Path(__file__).parent.parent / "data" / "gpt-oss-20b-decode-head.npz"


def trace(tokens: list[list[list[int]]], num_experts: int = 4) -> Trace:
    return Trace(experts=np.array(tokens), num_experts=num_experts, sequence_lengths=np.array([len(tokens)]))


def one_layer(*tokens: list[int], num_experts: int = 4) -> Trace:
    return trace([[token] for token in tokens], num_experts)


class TestLeases:
    def test_top_k_is_acquired_together(self) -> None:
        """LRU with two slots: 0 is resident when (0, 2) is acquired, and leased while 2 displaces 1."""
        result = replay(one_layer([0, 1], [2, 0], [0, 2]), "lru", num_slots=2)
        assert result.num_hits == 0 + 1 + 2
        assert result.num_evictions == 1
        assert result.hit_rate == pytest.approx(3 / 6)

    def test_misses_of_one_acquire_do_not_displace_each_other(self) -> None:
        result = replay(one_layer([0, 1], [2, 3], [2, 3]), "lru", num_slots=2)
        assert result.num_hits == 2

    def test_more_routed_experts_than_slots_go_in_waves(self) -> None:
        result = replay(one_layer([0, 1, 2], [0, 1, 2]), "lru", num_slots=1)
        assert result.num_hits == 1  # 2 was the last wave of the first token
        assert result.num_evictions == 2 + 2

    @pytest.mark.parametrize("policy", [*policy_names(), "belady"])
    def test_everything_fits(self, policy: str) -> None:
        result = replay(one_layer([0, 1], [2, 3], [0, 3], [1, 2]), policy, num_slots=4)
        assert result.num_hits == 4
        assert result.num_evictions == 0

    @pytest.mark.parametrize("policy", [*policy_names(), "belady"])
    @pytest.mark.parametrize("num_slots", [1, 2, 3])
    def test_every_policy_survives_tiny_pools(self, policy: str, num_slots: int) -> None:
        random = np.random.default_rng(0).random((30, 2, 6))
        tokens = np.argsort(random, axis=-1)[..., :2].tolist()
        result = replay(trace(tokens, 6), policy, num_slots=num_slots)
        assert result.num_accesses == 30 * 2 * 2
        assert 0 <= result.num_hits < result.num_accesses


class TestPools:
    TOKENS = ([[0, 1], [0, 1]], [[0, 1], [2, 3]], [[0, 1], [0, 1]])

    def test_layers_keep_to_their_own_slots(self) -> None:
        result = replay(trace(list(self.TOKENS)), "lru", num_slots=4, pool="layer")
        assert result.hit_rate_per_layer == (pytest.approx(4 / 6), 0.0)

    def test_global_pool_lends_slots(self) -> None:
        result = replay(trace(list(self.TOKENS)), "lru", num_slots=6)
        assert result.hit_rate_per_layer == (pytest.approx(4 / 6), pytest.approx(2 / 6))

    def test_first_layers_take_the_odd_slots(self) -> None:
        result = replay(trace(list(self.TOKENS)), "lru", num_slots=5, pool="layer")
        assert result.hit_rate_per_layer[0] == pytest.approx(4 / 6)

    def test_too_few_slots_to_divide(self) -> None:
        with pytest.raises(ConfigError, match="1 slots cannot serve 2 layers apart"):
            replay(trace(list(self.TOKENS)), "lru", num_slots=1, pool="layer")


class TestSlots:
    @pytest.mark.parametrize(
        ("slots", "expected"), [("25%", 6), ("12.5%", 3), (5, 5), ("7", 7), ("100%", 24), (99, 24)]
    )
    def test_numbers_and_shares(self, slots: str | int, expected: int) -> None:
        assert parse_slots(slots, trace([[[0]] * 4], num_experts=6)) == expected

    @pytest.mark.parametrize("slots", ["many", "25 %%", "0%", 0, "-3", "nan%", "inf%"])
    def test_nonsense(self, slots: str | int) -> None:
        with pytest.raises(ConfigError, match="Slots"):
            parse_slots(slots, trace([[[0]]]))


def test_next_uses() -> None:
    experts = np.array([[[0, 1], [2, 3]], [[1, 2], [3, 0]]])
    assert next_uses(experts, 4).tolist() == [[[NEVER, 2], [NEVER, 3]], [[NEVER, NEVER], [NEVER, NEVER]]]


def test_report_is_json_with_a_hit_rate_per_policy() -> None:
    report = replay_report(one_layer([0, 1], [2, 0]), ["lru", "belady"], ["50%", 3], ["layer", "global"])
    assert json.loads(json.dumps(report)) == report
    assert len(report["results"]) == 8
    first = report["results"][0]
    assert (first["policy"], first["pool"], first["num_slots"], first["share"]) == ("lru", "layer", 2, 0.5)
    assert first["hit_rate"] == pytest.approx(0.25)


class TestRealTrace:
    """The first 400 tokens of gpt-oss-20b routing; tests/data/README.md names the source and licence."""

    def test_default_policy_closes_half_of_the_gap(self) -> None:
        real = load_trace(REAL)
        num_slots = parse_slots("25%", real)
        lru = replay(real, "lru", num_slots=num_slots, pool="layer").hit_rate
        belady = replay(real, "belady", num_slots=num_slots, pool="layer").hit_rate
        assert replay(real, "knn", num_slots=num_slots).hit_rate > lru + (belady - lru) / 2

    def test_belady_bounds_every_policy(self) -> None:
        real = load_trace(REAL).head(150)
        bounds = {pool: replay(real, "belady", num_slots=192, pool=pool).hit_rate for pool in ("layer", "global")}
        for policy in policy_names():
            for pool in ("layer", "global"):
                assert replay(real, policy, num_slots=192, pool=pool).hit_rate <= bounds[pool]
