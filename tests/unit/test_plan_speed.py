"""Speed forecasts: the bound by hand, the hit curves, and what would help."""

from dataclasses import replace

import pytest
import torch

from offload_moe.plan.advice import best_changes
from offload_moe.plan.hit_rates import CURVES, HitCurve
from offload_moe.plan.machine import Machine, Rates
from offload_moe.plan.outlook import look_ahead
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.sizes import dense_memory_bytes, routed_bytes
from offload_moe.plan.speed import Forecast
from offload_moe.plan.working import cache_bytes
from tests.support.plan import GIB, real_shape, task, tiny_shape


@pytest.fixture(scope="module")
def mixtral() -> ModelShape:
    return real_shape("Mixtral-8x7B-v0.1")


def of_trace(forecasts: tuple[Forecast, ...], curve: HitCurve) -> Forecast:
    return next(forecast for forecast in forecasts if forecast.trace == curve.trace)


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.trace)
def test_more_slots_are_never_worse(curve: HitCurve) -> None:
    rates = [curve.at(slots, num_top_k=60, num_experts=640) for slots in range(641)]
    assert rates[0] == 0
    assert rates[60] == pytest.approx(curve.points[0][1])
    assert rates[640] == 1
    assert rates == sorted(rates)


def test_a_curve_gives_back_the_replay_it_was_made_from() -> None:
    gpt_oss, esft = CURVES
    assert gpt_oss.at(24 * 8, num_top_k=24 * 4, num_experts=24 * 32) == pytest.approx(0.753)
    assert gpt_oss.at(24 * 16, num_top_k=24 * 4, num_experts=24 * 32) == pytest.approx(0.940)
    assert esft.at(26 * 16, num_top_k=26 * 6, num_experts=26 * 64) == pytest.approx(0.594)


def test_a_token_in_ram_by_hand() -> None:
    shape = tiny_shape("mixtral")
    machine = Machine(ram_bytes=GIB, rates=Rates(ram=1e9, pass_layer_s=1e-3))
    outlook = look_ahead(task(shape, machine, context=100, dense_codec="bf16"))
    assert outlook.speed is not None
    (forecast, _) = outlook.speed.forecasts
    read = (
        dense_memory_bytes(shape, "bf16", torch.float32)
        - 128 * 64 * 4
        + cache_bytes(shape, 100, torch.float32, kept=torch.bfloat16)
    )
    assert (forecast.hit_rate, forecast.disk_rate, forecast.link_s, forecast.disk_s) == (1, 0, 0, 0)
    assert forecast.dense_s == pytest.approx(read / 1e9)
    assert forecast.expert_s == pytest.approx(3 * 2 * 12288 / 1e9)
    assert forecast.token_s == pytest.approx(3e-3 + read / 1e9 + 3 * 2 * 12288 / 1e9)
    assert forecast.bottleneck == "layer overhead"


def test_misses_take_the_link_and_the_disk(mixtral: ModelShape) -> None:
    machine = Machine(vram_bytes=12 * GIB, ram_bytes=16 * GIB)
    outlook = look_ahead(task(mixtral, machine, context=8192, dense_codec="nf4"))
    assert outlook.speed is not None
    assert outlook.placement.vram is not None
    routed = routed_bytes(mixtral, "nf4")
    for curve in CURVES:
        forecast = of_trace(outlook.speed.forecasts, curve)
        in_vram = curve.at(outlook.placement.vram.num_slots, num_top_k=64, num_experts=256)
        in_ram = curve.at(outlook.placement.ram.num_slots, num_top_k=64, num_experts=256)
        assert 0 < in_vram < in_ram < 1
        assert forecast.hit_rate == in_vram
        assert forecast.link_s == pytest.approx((1 - in_vram) * routed / 25e9)
        assert forecast.disk_s == pytest.approx((1 - in_ram) * routed / 1e9)
        rest = forecast.overhead_s + forecast.dense_s
        assert forecast.token_s == pytest.approx(rest + max(forecast.expert_s, forecast.link_s, forecast.disk_s))


def test_a_small_ram_tier_does_not_miss_more_than_what_reaches_it(mixtral: ModelShape) -> None:
    outlook = look_ahead(task(mixtral, Machine(vram_bytes=16 * GIB, ram_bytes=2 * GIB), dense_codec="nf4"))
    assert outlook.speed is not None
    for forecast in outlook.speed.forecasts:
        assert forecast.disk_rate == pytest.approx(1 - forecast.hit_rate)


@pytest.mark.parametrize(
    ("machine", "bottleneck"),
    [
        (Machine(vram_bytes=12 * GIB, ram_bytes=64 * GIB), "link"),
        (Machine(vram_bytes=12 * GIB, ram_bytes=8 * GIB), "disk"),
        (Machine(ram_bytes=64 * GIB, rates=Rates(layer_s=1e-5)), "expert compute"),
        (Machine(vram_bytes=80 * GIB, ram_bytes=64 * GIB, rates=Rates(layer_s=1e-5)), "expert compute"),
        (Machine(vram_bytes=80 * GIB, ram_bytes=64 * GIB), "layer overhead"),
    ],
)
def test_what_binds(mixtral: ModelShape, machine: Machine, bottleneck: str) -> None:
    outlook = look_ahead(task(mixtral, machine))
    assert outlook.speed is not None
    assert outlook.speed.bottleneck == bottleneck


def test_the_first_change_helps_most_and_keeps_its_promise(mixtral: ModelShape) -> None:
    planned = task(mixtral, Machine(vram_bytes=12 * GIB, ram_bytes=12 * GIB), context=8192)
    outlook = look_ahead(planned)
    changes = best_changes(planned, outlook)
    speeds = [change.tokens_per_s for change in changes]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] > outlook.tokens_per_s
    assert changes[0].name == "twice the RAM"
    doubled = replace(planned, machine=replace(planned.machine, ram_bytes=24 * GIB))
    assert look_ahead(doubled).tokens_per_s == pytest.approx(changes[0].tokens_per_s)


def test_more_memory_is_not_spent_on_a_wider_dense_codec_when_it_is_judged(mixtral: ModelShape) -> None:
    planned = task(mixtral, Machine(vram_bytes=8 * GIB, ram_bytes=64 * GIB))
    outlook = look_ahead(planned)
    assert outlook.placement.dense_codec == "int8"
    pinned = task(mixtral, Machine(vram_bytes=16 * GIB, ram_bytes=64 * GIB), dense_codec="int8")
    promised = {change.name: change.tokens_per_s for change in best_changes(planned, outlook)}
    assert promised["twice the VRAM"] == pytest.approx(look_ahead(pinned).tokens_per_s)


def test_a_store_is_not_told_to_change_its_codecs(mixtral: ModelShape) -> None:
    stored = task(mixtral, Machine(ram_bytes=16 * GIB), codec="int8", stored_dense_codec="int8")
    planned = replace(stored, is_store=True)
    assert not [change for change in best_changes(planned, look_ahead(planned)) if "codec" in change.name]
