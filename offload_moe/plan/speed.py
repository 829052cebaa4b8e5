"""The speed of a placement: simulated, from assumed rates and replayed hit rates.

A token takes at least the sum over its MoE layers of A + max(E, X): A before the router, E expert compute, X transfer
of the misses, which are known only after the router. Prefetch could hide X in part, and differences between layers
and tokens would raise the time; the bound has neither. `offload-moe simulate` has both, at the same costs.

In the device pass A has the launches of graphs, and X is the misses' transfer and compute; stepwise, the CPU's share.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from offload_moe.plan.attention import with_earlier_states
from offload_moe.plan.card_pass import NODES_OF_ENDS, PassShape
from offload_moe.plan.hit_rates import CURVES, QUEUED_CURVES, STEPWISE_CURVES, HitCurve
from offload_moe.plan.machine import Machine
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.placement import Placement, Settings, why_no_device_pass
from offload_moe.plan.sizes import dense_memory_bytes, routed_bytes, slot_bytes
from offload_moe.plan.working import cache_bytes
from offload_moe.simulate.costs import PassCosts, RunCosts

BASIS = "simulated: hit rates of replayed traces, assumed bandwidths, no prefetch"

Bottleneck = Literal["disk", "link", "CPU", "dense weights", "expert compute", "layer overhead"]
Way = Literal["modules", "queued", "stepwise"]  # of a decode step; the last two are the device pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Decoding one token with the hit rates of one trace. Seconds are per token, over all layers.

    hit_rate: share of routed experts in the fast tier. disk_rate: share of routed experts read from disk.
    cpu_s: of missing experts that the CPU computes beside a card.
    """

    trace: str
    way: Way = "modules"
    hit_rate: float
    disk_rate: float
    overhead_s: float
    dense_s: float
    expert_s: float
    link_s: float
    disk_s: float
    cpu_s: float = 0.0

    @property
    def token_s(self) -> float:
        before = self.overhead_s + self.dense_s
        if self.way == "queued":  # a pass stops for what is on disk
            return before + self.disk_s + max(self.expert_s, self.link_s)
        return before + max(self.expert_s, self.link_s, self.disk_s + self.cpu_s)

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s

    @property
    def bottleneck(self) -> Bottleneck:
        """The largest part of the time."""
        seconds: dict[Bottleneck, float] = {
            "disk": self.disk_s,
            "link": self.link_s,
            "CPU": self.cpu_s,
            "expert compute": self.expert_s,
            "dense weights": self.dense_s,
            "layer overhead": self.overhead_s,
        }
        return max(seconds, key=seconds.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One forecast per trace, the slowest first."""

    forecasts: tuple[Forecast, ...]

    @property
    def bottleneck(self) -> Bottleneck:
        """The bottleneck of the slowest forecast."""
        return self.forecasts[0].bottleneck

    @property
    def tokens_per_s(self) -> float:
        """The geometric mean of the forecasts, by which changes are compared."""
        return math.exp(sum(math.log(f.tokens_per_s) for f in self.forecasts) / len(self.forecasts))


def forecast_speed(shape: ModelShape, machine: Machine, settings: Settings, placement: Placement) -> Speed:
    costs = run_costs(shape, machine, settings, placement)
    if costs.device_pass is None:
        forecasts = [_forecast(curve, shape, machine, settings, placement) for curve in CURVES]
    else:
        curves = zip(CURVES, QUEUED_CURVES, STEPWISE_CURVES, strict=True)
        forecasts = [_faster_pass(each, shape, machine, settings, placement, costs) for each in curves]
    return Speed(forecasts=tuple(sorted(forecasts, key=lambda forecast: forecast.tokens_per_s)))


def _forecast(
    curve: HitCurve, shape: ModelShape, machine: Machine, settings: Settings, placement: Placement
) -> Forecast:
    rates, costs = machine.rates, run_costs(shape, machine, settings, placement)
    num_layers = len(shape.layers)
    routed, (fast_rate, ram_rate) = routed_bytes(shape, settings.codec), _hit_rates(curve, shape, placement)
    # The RAM tier serves only misses of the fast tier, so it cannot lower the rate.
    disk_rate = min(1 - fast_rate, 1 - ram_rate)
    return Forecast(
        trace=curve.trace,
        hit_rate=fast_rate,
        disk_rate=disk_rate,
        overhead_s=costs.token_host_s + num_layers * costs.layer_host_s,
        dense_s=costs.token_s + num_layers * costs.dense_s,
        expert_s=_num_top_k(shape) * costs.expert_s,
        link_s=(1 - fast_rate) * routed / rates.link if machine.has_device else 0.0,
        disk_s=disk_rate * routed / rates.disk,
    )


def _faster_pass(
    curves: tuple[HitCurve, HitCurve, HitCurve],
    shape: ModelShape,
    machine: Machine,
    settings: Settings,
    placement: Placement,
    costs: RunCosts,
) -> Forecast:
    """The device pass in the mode that is faster. curves: of one trace: the RAM tier's, and those of both modes."""
    in_ram, if_queued, if_stepwise = (_hit_rates(curve, shape, placement) for curve in curves)
    queued = _pass_forecast("queued", if_queued[0], in_ram[1], shape, machine, settings, costs)
    stepwise = _pass_forecast("stepwise", if_stepwise[0], in_ram[1], shape, machine, settings, costs)
    return replace(min(queued, stepwise, key=lambda forecast: forecast.token_s), trace=curves[0].trace)


def _pass_forecast(
    way: Way, hit_rate: float, ram_rate: float, shape: ModelShape, machine: Machine, settings: Settings, costs: RunCosts
) -> Forecast:
    passes, num_layers = costs.device_pass, len(shape.layers)
    assert passes is not None
    is_stepwise, num_pairs = way == "stepwise", _num_top_k(shape)
    num_missing, disk_rate = (1 - hit_rate) * num_pairs, min(1 - hit_rate, 1 - ram_rate)
    stopped = num_layers * (1 - (1 - disk_rate) ** (num_pairs / num_layers))  # layers with an expert on disk
    missing_s = passes.missing(num_missing, costs.expert_s, is_stepwise=is_stepwise)
    layer_s = passes.before_experts(num_missing / num_layers, is_stepwise=is_stepwise)
    return Forecast(
        trace="",
        way=way,
        hit_rate=hit_rate,
        disk_rate=disk_rate,
        overhead_s=passes.token_s + num_layers * layer_s + stopped * passes.stop_s,
        dense_s=costs.token_s + num_layers * costs.dense_s,
        expert_s=hit_rate * num_pairs * costs.expert_s,
        link_s=0.0 if is_stepwise else missing_s,
        cpu_s=missing_s if is_stepwise else 0.0,
        disk_s=disk_rate * routed_bytes(shape, settings.codec) / machine.rates.disk,
    )


def _hit_rates(curve: HitCurve, shape: ModelShape, placement: Placement) -> tuple[float, float]:
    """Of the fast tier's slots, and of the RAM tier's."""
    fast, ram = (
        curve.at(tier.num_slots, num_top_k=_num_top_k(shape), num_experts=shape.num_experts)
        for tier in (placement.fast, placement.ram)
    )
    return fast, ram


def _num_top_k(shape: ModelShape) -> int:
    return sum(min(shape.top_k, layer.num_experts) for layer in shape.layers)


def run_costs(shape: ModelShape, machine: Machine, settings: Settings, placement: Placement) -> RunCosts:
    """The costs of the model on a machine, for the forecast above and for the simulation.

    Dense weights of layers without experts, and the output head, are spread over the MoE layers.
    """
    rates, num_layers = machine.rates, len(shape.layers)
    memory, flops = (rates.vram, rates.device_flops) if machine.has_device else (rates.ram, rates.cpu_flops)
    num_routed = _num_top_k(shape)
    read = replace(shape, attention=with_earlier_states(shape.attention, 0))
    read_bytes = (
        dense_memory_bytes(shape, placement.dense_codec, machine.dtype, stored=settings.stored_dense_codec)
        - shape.lookup_elements * machine.dtype.itemsize
        + cache_bytes(read, placement.context, machine.dtype, kept=placement.cache_dtype)
    )
    is_ridden = takes_token_passes(shape, machine)
    layer_s = rates.pass_layer_s if is_ridden else rates.layer_s
    pair_parameters = sum(layer.expert_parameters for layer in shape.layers) / num_layers
    return RunCosts(
        layer_host_s=layer_s * shape.num_layers / num_layers,
        dense_s=read_bytes / memory / num_layers,
        dense_token_s=2 * (shape.dense_parameters - shape.lookup_elements) / flops / num_layers,
        wave_host_s=rates.wave_s,
        expert_s=routed_bytes(shape, settings.codec) / num_routed / memory,
        pair_s=2 * pair_parameters / flops,
        probe_host_s=rates.probe_s,
        has_token_passes=is_ridden,
        ask_host_s=rates.ask_s,
        account_host_s=rates.pass_layer_s,
        has_device=machine.has_device,
        device_pass=_pass_costs(shape, machine, settings),
    )


def _pass_costs(shape: ModelShape, machine: Machine, settings: Settings) -> PassCosts | None:
    """The costs of the device pass, launches of all layers spread over the MoE layers; None without it."""
    if why_no_device_pass(shape, machine, settings):
        return None
    assert isinstance(shape.device_pass, PassShape)
    rates, record, num_layers = machine.rates, slot_bytes(shape, settings.codec), len(shape.layers)
    return PassCosts(
        token_s=rates.sampling_s + NODES_OF_ENDS * rates.node_s,
        queued_nodes_s=shape.device_pass.queued_nodes * rates.node_s / num_layers,
        stepwise_nodes_s=shape.device_pass.stepwise_nodes * rates.node_s / num_layers,
        take_s=rates.node_s,
        step_s=rates.step_s,
        stop_s=rates.stop_s,
        fetch_s=record / rates.link,
        cpu_s=record / rates.ram,
    )


def takes_token_passes(shape: ModelShape, machine: Machine) -> bool:
    """Whether a config allows a decode step as one native call for all layers, see `offload_moe.decode.span`."""
    is_plain = shape.attention.keeps_all_tokens and not shape.attention.has_latents
    return not machine.has_device and machine.dtype == torch.float32 and is_plain
