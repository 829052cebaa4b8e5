"""A plan as a JSON document. Bytes are bytes, seconds are seconds, rates are 0 to 1."""

from dataclasses import asdict
from typing import Any

from offload_moe.plan.placement import Tier
from offload_moe.plan.plan import Plan
from offload_moe.plan.sizes import fp16_bytes
from offload_moe.plan.speed import BASIS, Forecast


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Ready for `json.dumps`; docs/plan.md describes the keys."""
    shape, placement = plan.shape, plan.placement
    tiers = {"vram": placement.vram, "ram": placement.ram, "disk": placement.disk}
    return {
        "model": plan.name,
        "architecture": shape.architecture,
        "model_type": shape.model_type,
        "total_parameters": shape.total_parameters,
        "active_parameters": shape.active_parameters,
        "fp16_bytes": fp16_bytes(shape.total_parameters),
        "active_fp16_bytes": fp16_bytes(shape.active_parameters),
        "num_layers": shape.num_layers,
        "num_moe_layers": len(shape.layers),
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "max_context": shape.max_context,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_is_exact": plan.checkpoint_is_exact,
        "store_bytes": plan.store_bytes,
        "context": placement.context,
        "codec": plan.settings.codec,
        "dense_codec": placement.dense_codec,
        "why_no_device_pass": plan.why_no_device_pass,
        "compute_dtype": str(plan.machine.dtype).removeprefix("torch."),
        "memory": {name: _tier(tier, len(shape.layers)) for name, tier in tiers.items()},
        "fits": plan.fits,
        "shortfalls": [asdict(shortfall) | {"missing_bytes": shortfall.missing_bytes} for shortfall in plan.shortfalls],
        "speed": _speed(plan),
        "changes": [asdict(change) for change in plan.changes],
        "multi_token_prediction": None if plan.mtp is None else asdict(plan.mtp),
    }


def _tier(tier: Tier | None, num_layers: int) -> dict[str, Any] | None:
    if tier is None:
        return None
    return {
        "budget_bytes": tier.budget_bytes,
        "used_bytes": tier.used_bytes,
        "missing_bytes": tier.missing_bytes,
        "parts": {part.name.replace(" ", "_").replace("/", "_"): part.num_bytes for part in tier.fixed},
        "num_slots": tier.num_slots,
        "slots_per_layer": tier.num_slots / num_layers,
        "slot_bytes": tier.slot_bytes,
    }


def _speed(plan: Plan) -> dict[str, Any] | None:
    if plan.speed is None:
        return None
    forecasts = plan.speed.forecasts
    return {
        "basis": BASIS,
        "low_tokens_per_s": forecasts[0].tokens_per_s,
        "high_tokens_per_s": forecasts[-1].tokens_per_s,
        "bottleneck": plan.speed.bottleneck,
        "rates": asdict(plan.machine.rates),
        "forecasts": [_forecast(forecast) for forecast in forecasts],
    }


def _forecast(forecast: Forecast) -> dict[str, Any]:
    derived = {"token_s": forecast.token_s, "tokens_per_s": forecast.tokens_per_s, "bottleneck": forecast.bottleneck}
    return asdict(forecast) | derived
