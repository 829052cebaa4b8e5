"""Every figure of the report against numbers computed by hand on a trace of four tokens."""

import json

import numpy as np
import pytest

from offload_moe.errors import ConfigError
from offload_moe.profile.balance import balance, dropped_share
from offload_moe.profile.behaviour import Favourite, coactivation, overlap, preferences
from offload_moe.profile.costs import Costs, costs
from offload_moe.profile.curves import VARIANTS, curve_of, variants
from offload_moe.profile.page import make_page
from offload_moe.profile.replay import replay
from offload_moe.profile.report import ProfileReport, make_report, report_to_json
from tests.support.extensions import Site
from tests.support.profile import METADATA, full_trace, routing_only


def quiet(phase: str, done: float = -1.0, total: float | None = None) -> None:
    assert 0 <= done <= 1


@pytest.fixture(scope="module")
def report() -> ProfileReport:
    return make_report(full_trace(), progress=quiet)


@pytest.fixture(scope="module")
def spent() -> Costs:
    found = costs(full_trace())
    assert found is not None
    return found


class TestBalance:
    def test_loads_are_counted(self) -> None:
        assert balance(routing_only()).load == [[0.5, 0.375, 0.125, 0.0], [0.125, 0.125, 0.5, 0.25]]

    def test_a_layer_by_hand(self) -> None:
        first = balance(full_trace()).layers[0]
        assert first.auxiliary_loss == pytest.approx(4 * (0.5 * 0.4 + 0.375 * 0.3 + 0.125 * 0.2))  # 1.35
        assert first.entropy_bits == pytest.approx(0.5 * 1 + 0.375 * 1.4150375 + 0.125 * 3)
        assert first.entropy_share == pytest.approx(first.entropy_bits / 2)
        assert first.variation == pytest.approx(np.sqrt(0.15625 / 4) / 0.25)
        assert (first.busiest, first.busiest_share, first.busiest_quarter_share) == (0, 0.5, 0.5)
        assert (first.num_dead, first.num_hot) == (1, 0)  # 0.5 is twice the mean, not above it
        assert first.dropped == {"1.0": 3 / 8, "1.1": 1 / 8, "1.25": 1 / 8, "1.5": 1 / 8}

    def test_even_routing_is_the_least(self) -> None:
        trace = full_trace(experts=np.array([[[0, 1], [0, 1]], [[2, 3], [2, 3]]] * 2))
        for layer in balance(trace).layers:
            assert layer.auxiliary_loss == pytest.approx(1.0)
            assert (layer.entropy_share, layer.variation, layer.num_dead) == (pytest.approx(1.0), 0.0, 0)
            assert set(layer.dropped.values()) == {0.0}

    def test_one_expert_for_all_is_the_most(self) -> None:
        experts = np.zeros((4, 2, 1), dtype=int)
        only = np.tile(np.array([1.0, 0, 0, 0]), (4, 2, 1))
        trace = full_trace(experts=experts, router_probabilities=only, outcomes=None, computed_on_cpu=None)
        first = balance(trace).layers[0]
        assert (first.auxiliary_loss, first.entropy_bits) == (4.0, 0.0)
        assert (first.num_dead, first.num_hot) == (3, 1)
        assert first.dropped["1.5"] == (4 - 2) / 4  # ceil(1.5 * 4 / 4) = 2 of 4 are kept

    def test_without_router_probabilities(self) -> None:
        assert balance(routing_only()).layers[0].auxiliary_loss is None

    def test_dead_by_chance(self) -> None:
        assert balance(routing_only()).num_dead_by_chance == pytest.approx(4 * 0.5**4)

    def test_capacity_is_rounded_up_from_the_exact_product(self) -> None:
        """1.1 * 50 / 5 is 11.000000000000002 in floating point; the capacity is 11."""
        assert dropped_share(np.array([12, 11, 10, 9, 8]), 1.1) == pytest.approx(1 / 50)


class TestBehaviour:
    def test_overlap_stays_within_sequences(self) -> None:
        found = overlap(routing_only())
        assert found is not None
        assert found.adjacent == [0.5, 0.75]
        assert found.by_chance == [pytest.approx((1 + 0.5625 + 0.0625) / 2), pytest.approx(0.6875)]

    def test_no_neighbours(self) -> None:
        assert overlap(full_trace(sequence_lengths=np.ones(4, dtype=int))) is None

    def test_preferences(self) -> None:
        first, second = preferences(routing_only(), ["a", "unused", "b"], np.array([0, 0, 2, 2]))
        assert (first.name, first.num_tokens, second.name) == ("a", 2, "b")
        assert first.distance == [pytest.approx(0.125), pytest.approx(0.25)]
        assert sorted((f.layer, f.expert, f.share, f.lift) for f in first.favourites) == [(0, 2, 0.5, 2), (1, 3, 1, 2)]
        assert second.favourites[2] == Favourite(layer=0, expert=1, share=1.0, lift=pytest.approx(4 / 3))

    def test_kinds_that_do_not_matter_are_no_further_than_chance(self) -> None:
        random = np.random.default_rng(0)
        experts = np.argsort(random.random((600, 3, 16)), axis=-1)[..., :4]
        trace = full_trace(
            experts=experts,
            num_experts=16,
            sequence_lengths=np.array([600]),
            **dict.fromkeys(
                ("router_probabilities", "token_ids", "is_prompt", "forwards", "outcomes", "computed_on_cpu")
            ),
            **dict.fromkeys(
                ("stall_s", "loaded_bytes", "prefetch_issued", "prefetch_useful", "compute_s", "forward_s")
            ),
        )
        for kind in preferences(trace, ["a", "b"], random.integers(0, 2, 600)):
            assert np.mean(kind.distance) == pytest.approx(kind.distance_by_chance, rel=0.3)

    def test_mean_lift(self) -> None:
        found = coactivation(routing_only())
        assert found.mean_lift == [pytest.approx((8 + 4 / 3 + 4 / 3 + 3 + 2 / 3 + 1 + 2) / 16)]
        assert found.strongest == []  # nothing was seen on five tokens

    def test_strongest_succession(self) -> None:
        best = coactivation(routing_only(repeats=5)).strongest[0]
        assert (best.layer, best.expert, best.following, best.num_tokens) == (0, 2, 3, 5)
        assert (best.probability, best.lift) == (1.0, pytest.approx(2.0))


class TestCosts:
    def test_only_generated_tokens_count(self, spent: Costs) -> None:
        assert (spent.num_tokens, spent.are_prompts, spent.share_on_cpu) == (2, False, 0.0)

    def test_rates_of_a_layer(self, spent: Costs) -> None:
        vram, ram = spent.layers[1].tiers
        assert (vram.hit_rate, vram.delayed_hit_rate, vram.miss_rate) == (0.5, 0.25, 0.25)
        assert (ram.hit_rate, ram.miss_rate) == (0.0, 1.0)  # asked once: a delayed hit asks nobody

    def test_rates_of_all_layers(self, spent: Costs) -> None:
        vram, ram = spent.total.tiers
        assert (vram.hit_rate, vram.delayed_hit_rate, vram.miss_rate) == (5 / 8, 1 / 8, 2 / 8)
        assert (ram.hit_rate, ram.delayed_hit_rate, ram.miss_rate) == (0.5, 0.0, 0.5)

    def test_a_tier_that_was_never_asked_has_no_rate(self) -> None:
        found = costs(full_trace(outcomes=np.zeros((4, 2, 2, 2), dtype=int)))
        assert found is not None
        assert [tier.hit_rate for tier in found.total.tiers] == [1.0, None]

    def test_per_token(self, spent: Costs) -> None:
        vram, ram = spent.layers[1].tiers
        assert (vram.stall_s, ram.stall_s) == (pytest.approx(0.01), pytest.approx(0.015))
        assert (vram.loaded_bytes, ram.loaded_bytes) == (100, 25)
        assert (vram.prefetch_issued, vram.prefetch_useful, ram.prefetch_issued) == (1.5, 0.5, 0.5)
        assert spent.layers[0].tiers[0].loaded_bytes == 50
        assert spent.layers[1].compute_s == pytest.approx(0.2)

    def test_the_parts_of_a_token_add_up(self, spent: Costs) -> None:
        time = spent.time
        assert time.experts_s == pytest.approx(0.3)
        assert time.stall_s == {"vram": pytest.approx(0.015), "ram": pytest.approx(0.015)}
        assert time.rest_s == pytest.approx(0.45 - 0.3 - 0.03)
        assert time.between_s == pytest.approx(0.01)
        assert time.token_s == pytest.approx(0.46)

    def test_prompts_alone(self) -> None:
        found = costs(full_trace(is_prompt=np.ones(4, dtype=bool)))
        assert found is not None
        assert (found.num_tokens, found.are_prompts) == (4, True)

    def test_a_trace_without_times(self) -> None:
        assert costs(routing_only()) is None


class TestCurves:
    def test_points_are_replays(self, report: ProfileReport) -> None:
        trace = full_trace()
        assert {(p.policy, p.pool) for p in report.curves.points} == set(VARIANTS)
        for point in report.curves.points:
            expected = replay(trace, point.policy, num_slots=point.num_slots, pool=point.pool).hit_rate
            assert (point.hit_rate, point.share) == (expected, point.num_slots / 8)

    def test_sizes_are_shares_and_the_recorded_one(self, report: ProfileReport) -> None:
        assert [p.num_slots for p in curve_of(report.curves.points, "lru")] == [1, 2, 3, 4, 6]
        assert [p.num_slots for p in curve_of(report.curves.points, "lru", "layer")] == [2, 3, 4, 6]

    def test_now(self, report: ProfileReport) -> None:
        now = report.curves.now
        assert now is not None
        assert (now.policy, now.num_slots, now.share, now.hit_rate) == ("lru", 4, 0.5, 5 / 8)

    def test_the_policy_of_an_extension_that_was_recorded_is_compared_too(self, site: Site) -> None:
        entries = {"offload_moe.policies": {"acme": "acme:Acme", "other": "absent:Other"}}
        code = "from offload_moe.residency.policy.frequency import LFU\nclass Acme(LFU):\n    def __init__(self, *_): "
        site.write("acme-moe", entries, acme=f"{code}super().__init__()\n")
        report = make_report(full_trace(metadata=json.dumps(METADATA | {"policy": "acme"})), progress=quiet)
        hits = [[p.hit_rate for p in curve_of(report.curves.points, policy)] for policy in ("acme", "lfu", "lru")]
        assert hits[0] == hits[1] != hits[2]
        assert report.curves.more_memory is not None
        assert report.curves.more_memory.hit_rate_now == hits[0][3]
        page = make_page(report)
        assert "acme" in page
        assert "other" not in variants(report.curves.points)

    @pytest.mark.parametrize("policy", ["acme", "lru-9", ""])
    def test_a_recorded_policy_that_is_not_there_is_an_error(self, policy: str) -> None:
        with pytest.raises(ConfigError, match=f"There is no policy '{policy}'"):
            make_report(full_trace(metadata=json.dumps(METADATA | {"policy": policy})), progress=quiet)

    def test_a_recording_that_names_no_policy_was_made_with_the_default(self) -> None:
        metadata = {name: value for name, value in METADATA.items() if name != "policy"}
        now = make_report(full_trace(metadata=json.dumps(metadata)), progress=quiet).curves.now
        assert now is not None
        assert now.policy == "knn"

    def test_two_more_gib_are_two_more_slots(self, report: ProfileReport) -> None:
        more = report.curves.more_memory
        assert more is not None
        before, after = (replay(full_trace(), "lru", num_slots=size).hit_rate for size in (4, 6))
        assert (more.num_slots, more.hit_rate_now, more.hit_rate) == (6, before, after)
        assert after > before
        # 3 of 8 experts missed in 2 tokens made compute wait 0.06 s: 0.02 s each
        assert more.saved_s == pytest.approx((after - before) * 4 * 0.02)

    def test_no_more_is_saved_than_was_waited(self) -> None:
        """Prefetch left one miss in two tokens; the replays, without it, gain more than that."""
        outcomes = np.zeros((4, 2, 2, 2), dtype=int)
        outcomes[3, 0, 0] = 2
        metadata = json.dumps({**METADATA, "num_slots": {"vram": 1}, "slot_bytes": 2**20})
        more = make_report(full_trace(outcomes=outcomes, metadata=metadata), progress=quiet).curves.more_memory
        assert more is not None
        assert more.num_slots == 8
        assert (more.hit_rate - more.hit_rate_now) * 4 > 0.5
        assert more.saved_s == pytest.approx(0.03)

    def test_a_foreign_trace_has_no_budget(self) -> None:
        found = make_report(routing_only(), progress=quiet)
        assert (found.curves.now, found.curves.more_memory, found.costs) == (None, None, None)


class TestReport:
    def test_kinds_come_from_the_metadata(self, report: ProfileReport) -> None:
        assert [(kind.name, kind.num_tokens) for kind in report.by_class] == [
            ("letters", 2),
            ("number", 1),
            ("other", 1),
        ]
        assert [(kind.name, kind.num_tokens) for kind in report.by_group] == [("prose", 3), ("a < b", 1)]

    def test_one_group_is_no_group(self) -> None:
        trace = full_trace(metadata=json.dumps({**METADATA, "groups": ["", ""]}))
        assert make_report(trace, progress=quiet).by_group == []

    def test_json_has_every_number(self, report: ProfileReport) -> None:
        document = report_to_json(report)
        assert json.loads(json.dumps(document, allow_nan=False)) == document
        assert document["costs"]["total"]["tiers"][0]["hit_rate"] == 5 / 8
        assert document["balance"]["layers"][0]["auxiliary_loss"] == pytest.approx(1.35)
        assert document["overlap"]["adjacent"] == [0.5, 0.75]
        assert document["lookahead_recall"]["1"] == [None, 0.75]
