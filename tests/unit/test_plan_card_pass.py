"""The device pass in plans: its launches, its memory, and its speed by hand."""

from dataclasses import replace

import pytest

from offload_moe.plan import make_plan, with_card
from offload_moe.plan.card_pass import GRAPH_NODE_BYTES, PassShape
from offload_moe.plan.hit_rates import CURVES, QUEUED_CURVES, STEPWISE_CURVES, HitCurve
from offload_moe.plan.machine import Machine, Rates
from offload_moe.plan.outlook import look_ahead
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.placement import why_no_device_pass
from offload_moe.plan.sizes import routed_bytes, slot_bytes
from offload_moe.plan.speed import Forecast
from tests.support.benchmarks import BENCHMARKS
from tests.support.plan import GIB, real_shape, task, tiny_shape

CARD = Machine(vram_bytes=12 * GIB, ram_bytes=64 * GIB)


@pytest.fixture(scope="module")
def mixtral() -> ModelShape:
    return real_shape("Mixtral-8x7B-v0.1")


def pass_of(shape: ModelShape) -> PassShape:
    assert isinstance(shape.device_pass, PassShape)
    return shape.device_pass


def forecasts(shape: ModelShape, machine: Machine, **settings: object) -> tuple[Forecast, ...]:
    outlook = look_ahead(task(shape, machine, device_pass=True, **settings))
    assert outlook.speed is not None
    return outlook.speed.forecasts


def test_launches_of_a_layer(mixtral: ModelShape) -> None:
    assert pass_of(mixtral).queued_nodes == 32 * 16
    assert pass_of(mixtral).stepwise_nodes == 32 * 12
    # per layer: 8 of attention in latents and 4 of the router, or 3 of a dense MLP; experts 6, and 2 of a shared one
    assert pass_of(real_shape("DeepSeek-V3")).queued_nodes == 61 * 8 + 3 * 3 + 58 * (4 + 6 + 2)


def test_a_resident_token_by_hand() -> None:
    shape = tiny_shape("mixtral")
    machine = Machine(vram_bytes=2 * GIB, ram_bytes=GIB, rates=Rates(vram=1e9))
    (forecast, other) = forecasts(shape, machine, dense_codec="int8")
    assert (forecast.way, forecast.hit_rate, forecast.link_s, forecast.cpu_s) == ("queued", 1, 0, 0)
    launches = (3 * 16 + 6) * 2.5e-6
    assert forecast.overhead_s == pytest.approx(1e-3 + launches)
    assert forecast.expert_s == pytest.approx(routed_bytes(shape, "nf4") / 1e9)
    assert forecast.token_s == pytest.approx(forecast.overhead_s + forecast.dense_s + forecast.expert_s)
    assert other.token_s == forecast.token_s


@pytest.mark.parametrize(
    ("card", "context", "tokens_per_s"), [("rtx-4090", 1024, 150), ("rtx-3060", 1024, 38), ("rtx-3060", 8192, 38)]
)
def test_what_a_card_is_expected_to_reach(card: str, context: int, tokens_per_s: int) -> None:
    """Fixed inputs: 2.5 us a node, 70% of the card's bandwidth, 1 ms outside of the pass, both traces' hit rates."""
    machine = with_card(Machine(ram_bytes=32 * GIB), card)
    plan = make_plan(str(BENCHMARKS / "configs/Qwen3-30B-A3B.json"), machine, context=context, dense_codec="int8")
    assert plan.speed is not None
    assert min(each.tokens_per_s for each in plan.speed.forecasts) >= tokens_per_s


def test_what_is_missing_is_computed_where_that_is_faster(mixtral: ModelShape) -> None:
    slow_link = replace(CARD, rates=Rates(link=10e9))
    for forecast in forecasts(mixtral, slow_link, dense_codec="int8"):
        assert forecast.way == "stepwise"
        missed = (1 - forecast.hit_rate) * 64
        assert forecast.cpu_s == pytest.approx(missed * slot_bytes(mixtral, "nf4") / 40e9)
        takes = min(32, missed)
        assert forecast.overhead_s == pytest.approx(1e-3 + 2.5e-6 * (32 * 12 + 6 + takes) + 32 * 40e-6)
        assert forecast.token_s == pytest.approx(
            forecast.overhead_s + forecast.dense_s + max(forecast.expert_s, forecast.cpu_s)
        )
    slow_cpu = replace(CARD, rates=Rates(ram=5e9))
    for forecast in forecasts(mixtral, slow_cpu, dense_codec="int8"):
        assert forecast.way == "queued"
        missed = (1 - forecast.hit_rate) * 64
        expert_s = slot_bytes(mixtral, "nf4") / 360e9
        assert forecast.link_s == pytest.approx(missed * (slot_bytes(mixtral, "nf4") / 25e9 + expert_s))
        assert forecast.expert_s == pytest.approx(forecast.hit_rate * 64 * expert_s)


def test_a_queued_pass_stops_for_the_disk(mixtral: ModelShape) -> None:
    machine = Machine(vram_bytes=12 * GIB, ram_bytes=16 * GIB, rates=Rates(ram=1e9))
    for forecast in forecasts(mixtral, machine, dense_codec="int8"):
        assert forecast.way == "queued"
        assert forecast.disk_s > 0
        rest = max(forecast.expert_s, forecast.link_s)
        assert forecast.token_s == pytest.approx(forecast.overhead_s + forecast.dense_s + forecast.disk_s + rest)
        launches = 1e-3 + 2.5e-6 * (32 * 16 + 6)
        stopped = 32 * (1 - (1 - forecast.disk_rate) ** 2)
        assert forecast.overhead_s == pytest.approx(launches + 0.5e-3 * stopped)


def test_graphs_and_buffers_take_slots(mixtral: ModelShape) -> None:
    with_pass, without = (
        look_ahead(task(mixtral, CARD, dense_codec="int8", device_pass=is_on)).placement.vram for is_on in (True, False)
    )
    assert with_pass is not None
    assert without is not None
    parts = {part.name: part.num_bytes for part in with_pass.fixed}
    added = pass_of(mixtral).graph_nodes * GRAPH_NODE_BYTES + pass_of(mixtral).buffer_bytes(64, 256)
    assert parts["graphs of the device pass"] + parts["buffers of the device pass"] == added
    assert with_pass.fixed_bytes == without.fixed_bytes + added
    assert pass_of(mixtral).graph_nodes == 4 * (32 * 18 + 13)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_pass": False}, "it is off"),
        ({"codec": "bf16"}, "bf16 records keep their rows in order"),
    ],
)
def test_why_there_is_no_pass(mixtral: ModelShape, changes: dict[str, object], reason: str) -> None:
    planned = task(mixtral, CARD, **({"device_pass": True} | changes))
    assert why_no_device_pass(mixtral, CARD, planned.settings) == reason
    outlook = look_ahead(planned)
    assert outlook.speed is None or {each.way for each in outlook.speed.forecasts} == {"modules"}


def test_layers_that_nothing_declares_have_none() -> None:
    shape = real_shape("DeepSeek-V4-Flash")
    assert isinstance(shape.device_pass, str)
    planned = task(shape, Machine(vram_bytes=64 * GIB, ram_bytes=400 * GIB), device_pass=True)
    assert why_no_device_pass(shape, planned.machine, planned.settings) == shape.device_pass


def test_dense_mlps_in_bf16_keep_the_pass() -> None:
    shape = real_shape("GLM-4.5-Air")
    machine = Machine(vram_bytes=100 * GIB, ram_bytes=200 * GIB)
    chosen = {look_ahead(task(shape, machine, device_pass=is_on)).placement.dense_codec for is_on in (True, False)}
    assert chosen == {"bf16"}
    pinned = task(shape, machine, device_pass=True, dense_codec="bf16")
    assert why_no_device_pass(shape, machine, pinned.settings) == ""
    outlook = look_ahead(pinned)
    assert outlook.speed is not None
    assert outlook.speed.forecasts[0].way in ("queued", "stepwise")


@pytest.mark.parametrize("curve", [*QUEUED_CURVES, *STEPWISE_CURVES], ids=lambda curve: curve.trace)
def test_more_slots_are_never_worse(curve: HitCurve) -> None:
    rates = [curve.at(slots, num_top_k=60, num_experts=640) for slots in range(641)]
    assert rates == sorted(rates)
    assert (rates[0], rates[640]) == (0, 1)


def test_each_trace_has_a_curve_for_every_rule() -> None:
    for curves in zip(CURVES, QUEUED_CURVES, STEPWISE_CURVES, strict=True):
        assert len({curve.trace for curve in curves}) == 1
        assert len({curve.points[0][0] for curve in curves}) == 1
