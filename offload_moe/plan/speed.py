"""The speed of a placement: simulated, from assumed rates and replayed hit rates.

A token takes at least the sum over its MoE layers of A + max(E, X): A before the router, E expert compute, X transfer
of the misses, which are known only after the router. Prefetch could hide X in part, and differences between layers
and tokens would raise the time; the bound has neither. `offload-moe simulate` has both, at the same costs.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from offload_moe.plan.hit_rates import CURVES, HitCurve
from offload_moe.plan.machine import Machine
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.placement import Placement, Settings
from offload_moe.plan.sizes import dense_memory_bytes, routed_bytes
from offload_moe.plan.working import cache_bytes
from offload_moe.simulate.costs import RunCosts

BASIS = "simulated: hit rates of replayed traces, assumed bandwidths, no prefetch"

Bottleneck = Literal["disk", "link", "dense weights", "expert compute", "layer overhead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Decoding one token with the hit rates of one trace. Seconds are per token, over all layers.

    hit_rate: share of routed experts in the fast tier. disk_rate: share of routed experts read from disk.
    """

    trace: str
    hit_rate: float
    disk_rate: float
    overhead_s: float
    dense_s: float
    expert_s: float
    link_s: float
    disk_s: float

    @property
    def token_s(self) -> float:
        return self.overhead_s + self.dense_s + max(self.expert_s, self.link_s, self.disk_s)

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s

    @property
    def bottleneck(self) -> Bottleneck:
        """The largest part of the time."""
        seconds: dict[Bottleneck, float] = {
            "disk": self.disk_s,
            "link": self.link_s,
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
    forecasts = [_forecast(curve, shape, machine, settings, placement) for curve in CURVES]
    return Speed(forecasts=tuple(sorted(forecasts, key=lambda forecast: forecast.tokens_per_s)))


def _forecast(
    curve: HitCurve, shape: ModelShape, machine: Machine, settings: Settings, placement: Placement
) -> Forecast:
    rates, costs = machine.rates, run_costs(shape, machine, settings, placement)
    num_layers = len(shape.layers)
    num_top_k = sum(min(shape.top_k, layer.num_experts) for layer in shape.layers)

    def hit_rate(num_slots: int) -> float:
        return curve.at(num_slots, num_top_k=num_top_k, num_experts=shape.num_experts)

    routed = routed_bytes(shape, settings.codec)
    fast_rate = hit_rate(placement.fast.num_slots)
    # The RAM tier serves only misses of the fast tier, so it cannot lower the rate.
    disk_rate = min(1 - fast_rate, 1 - hit_rate(placement.ram.num_slots))
    return Forecast(
        trace=curve.trace,
        hit_rate=fast_rate,
        disk_rate=disk_rate,
        overhead_s=costs.token_host_s + num_layers * costs.layer_host_s,
        dense_s=costs.token_s + num_layers * costs.dense_s,
        expert_s=num_top_k * costs.expert_s,
        link_s=(1 - fast_rate) * routed / rates.link if machine.has_device else 0.0,
        disk_s=disk_rate * routed / rates.disk,
    )


def run_costs(shape: ModelShape, machine: Machine, settings: Settings, placement: Placement) -> RunCosts:
    """The costs of the model on a machine, for the forecast above and for the simulation.

    Dense weights of layers without experts, and the output head, are spread over the MoE layers.
    """
    rates, num_layers = machine.rates, len(shape.layers)
    memory, flops = (rates.vram, rates.device_flops) if machine.has_device else (rates.ram, rates.cpu_flops)
    num_routed = sum(min(shape.top_k, layer.num_experts) for layer in shape.layers)
    read_bytes = (
        dense_memory_bytes(shape, placement.dense_codec, machine.dtype, stored=settings.stored_dense_codec)
        - shape.lookup_elements * machine.dtype.itemsize
        + cache_bytes(shape, placement.context, machine.dtype, kept=placement.cache_dtype)
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
    )


def takes_token_passes(shape: ModelShape, machine: Machine) -> bool:
    """Whether a config allows a decode step as one native call for all layers, see `offload_moe.decode.span`."""
    is_plain = shape.attention.keeps_all_tokens and not shape.attention.has_latents
    return not machine.has_device and machine.dtype == torch.float32 and is_plain
