"""The costs of a generated token: hits, misses, stalls, bytes and prefetches per layer, and the parts of its time.

Prompts are left out, unless the trace has nothing else, because a miss costs little in their large chunks.
F forwards, L MoE layers, K top-k, R tiers.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload_moe.profile.trace import DELAYED_HIT, HIT, MISS, Trace

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCosts:
    """Rates are shares of the routed experts that the tier served; other figures are per token.

    A tier serves the misses of the faster one. None: not recorded, or without accesses.
    """

    tier: str
    hit_rate: float | None
    delayed_hit_rate: float | None
    miss_rate: float | None
    stall_s: float
    loaded_bytes: float
    prefetch_issued: float
    prefetch_useful: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    layer: int
    compute_s: float
    tiers: list[TierCosts]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTime:
    """Mean seconds per token, whose sum is `token_s`.

    experts_s: in the experts, without waiting; stall_s: waiting, per tier; rest_s: the rest of the forward, attention
    above all; between_s: from one forward to the next, for sampling and detokenization.
    """

    token_s: float
    experts_s: float
    stall_s: dict[str, float]
    rest_s: float
    between_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    num_tokens: int
    are_prompts: bool
    share_on_cpu: float | None
    time: TokenTime
    total: LayerCosts  # layer is -1
    layers: list[LayerCosts]


def costs(trace: Trace) -> Costs | None:
    """None for a trace without times."""
    if trace.outcomes is None or trace.forward_s is None or trace.compute_s is None or trace.forwards is None:
        return None
    is_prompt = np.zeros(trace.num_tokens, dtype=bool) if trace.is_prompt is None else trace.is_prompt
    rows = np.arange(trace.num_tokens) if is_prompt.all() else np.flatnonzero(~is_prompt)
    forwards = np.unique(trace.forwards[rows])
    everything = slice(None)
    return Costs(
        num_tokens=len(rows),
        are_prompts=bool(is_prompt.all()),
        share_on_cpu=None if trace.computed_on_cpu is None else float(trace.computed_on_cpu[rows].mean()),
        time=_time(trace, rows, forwards),
        total=_layer(trace, -1, rows, forwards, everything),
        layers=[_layer(trace, layer, rows, forwards, slice(layer, layer + 1)) for layer in range(trace.num_layers)],
    )


def _layer(trace: Trace, layer: int, rows: Array, forwards: Array, layers: slice) -> LayerCosts:
    assert trace.outcomes is not None
    assert trace.compute_s is not None
    outcomes = trace.outcomes[rows][:, layers]
    compute_s = float(trace.compute_s[forwards][:, layers].sum() / len(rows))
    tiers, asked = [], np.ones(outcomes.shape[:3], dtype=bool)
    for number, name in enumerate(trace.tiers):
        found = outcomes[..., number][asked]
        measured = {
            field: 0.0 if array is None else float(array[forwards][:, layers, number].sum() / len(rows))
            for field in ("stall_s", "loaded_bytes", "prefetch_issued", "prefetch_useful")
            for array in [getattr(trace, field)]
        }
        rates = [float((found == code).mean()) if len(found) else None for code in (HIT, DELAYED_HIT, MISS)]
        tiers.append(TierCosts(tier=name, hit_rate=rates[0], delayed_hit_rate=rates[1], miss_rate=rates[2], **measured))
        asked &= outcomes[..., number] == MISS
    return LayerCosts(layer=layer, compute_s=compute_s, tiers=tiers)


def _time(trace: Trace, rows: Array, forwards: Array) -> TokenTime:
    assert trace.forward_s is not None
    assert trace.compute_s is not None
    num_tokens = len(rows)
    forward = float(trace.forward_s[forwards].sum() / num_tokens)
    experts = float(trace.compute_s[forwards].sum() / num_tokens)
    waited = np.zeros(len(trace.tiers)) if trace.stall_s is None else trace.stall_s[forwards].sum(axis=(0, 1))
    stalls = {name: float(waited[number] / num_tokens) for number, name in enumerate(trace.tiers)}
    metadata = json.loads(trace.metadata)
    num_between = metadata.get("num_between_tokens", 0)
    between = float(metadata["between_tokens_s"] / num_between) if num_between else 0.0
    return TokenTime(
        token_s=forward + between,
        experts_s=experts,
        stall_s=stalls,
        rest_s=forward - experts - sum(stalls.values()),
        between_s=between,
    )
