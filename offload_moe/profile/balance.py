"""Load balance of the experts, in the literature's terms.

T tokens, L MoE layers, E experts per layer, K top-k. f: an expert's share of the routed pairs; P: its mean router
probability; both sum to one over a layer.
Source of f, P and the loss: Fedus, Zoph and Shazeer 2021, "Switch Transformers" (arXiv 2101.03961), section 2.2,
with top-k instead of top-1; of the capacity: Lepikhin et al. 2020, "GShard" (arXiv 2006.16668), section 2.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload_moe.profile.trace import Trace

CAPACITY_FACTORS = (1.0, 1.1, 1.25, 1.5)
HOT = 2.0  # times the mean load


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBalance:
    """auxiliary_loss: E * sum(f * P), 1 when perfectly even; None without router probabilities.

    entropy_share: of log2(E), 1 when even. dropped: share of the routed pairs beyond an expert's capacity, per factor.
    """

    layer: int
    auxiliary_loss: float | None
    entropy_bits: float
    entropy_share: float
    variation: float
    busiest: int
    busiest_share: float
    busiest_quarter_share: float
    num_dead: int
    num_hot: int
    dropped: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """load, probability: [L][E], with as many E as the layer has.

    num_dead_by_chance: per layer in the mean, were every choice of K as likely as any other.
    """

    num_tokens: int
    load: list[list[float]]
    probability: list[list[float]] | None
    num_dead_by_chance: float
    layers: list[LayerBalance]


def balance(trace: Trace) -> Balance:
    sizes = trace.keys.num_experts
    counts = [np.bincount(trace.experts[:, layer].ravel(), minlength=size) for layer, size in enumerate(sizes)]
    probabilities = _mean_probabilities(trace, sizes)
    return Balance(
        num_tokens=trace.num_tokens,
        load=[(count / (trace.num_tokens * trace.top_k)).tolist() for count in counts],
        probability=None if probabilities is None else [layer.tolist() for layer in probabilities],
        num_dead_by_chance=mean(size * (1 - trace.top_k / size) ** trace.num_tokens for size in sizes),
        layers=[
            _layer(layer, count, None if probabilities is None else probabilities[layer])
            for layer, count in enumerate(counts)
        ],
    )


def _mean_probabilities(trace: Trace, sizes: Sequence[int]) -> list[NDArray[np.float64]] | None:
    """Of each layer, over the experts that it has."""
    known = trace.router_probabilities
    if known is None:
        return None
    return [row[:size] for row, size in zip(known.mean(axis=0, dtype=np.float64), sizes, strict=True)]


def _layer(layer: int, counts: NDArray[Any], probability: NDArray[Any] | None) -> LayerBalance:
    num_pairs, num_experts = int(counts.sum()), len(counts)
    load = counts / num_pairs
    used = load[load > 0]
    entropy = float(-(used * np.log2(used)).sum())
    descending = np.sort(load)[::-1]
    return LayerBalance(
        layer=layer,
        auxiliary_loss=None if probability is None else float(num_experts * (load * probability).sum()),
        entropy_bits=entropy,
        entropy_share=entropy / math.log2(num_experts) if num_experts > 1 else 1.0,
        variation=float(load.std() / load.mean()),
        busiest=int(load.argmax()),
        busiest_share=float(descending[0]),
        busiest_quarter_share=float(descending[: math.ceil(num_experts / 4)].sum()),
        num_dead=int((counts == 0).sum()),
        num_hot=int((load > HOT / num_experts).sum()),
        dropped={str(factor): dropped_share(counts, factor) for factor in CAPACITY_FACTORS},
    )


def dropped_share(counts: NDArray[Any], factor: float) -> float:
    """The share of routed pairs beyond the experts' capacity, with all tokens as one batch.

    Capacity: factor * pairs / E, rounded up.
    """
    num_pairs = int(counts.sum())
    capacity = math.ceil(round(factor * num_pairs / len(counts), 6))
    return float(np.maximum(counts - capacity, 0).sum() / num_pairs)
