"""Synthetic routing for models without a trace: uneven load, and tokens that keep some of the last token's experts."""

import json
from collections.abc import Sequence

import numpy as np

from offload_moe.profile.trace import Trace, layer_sizes

SKEW, REUSE = 0.8, 0.3  # see docs/simulate.md


def synthetic_trace(
    *,
    num_experts: Sequence[int],
    top_k: int,
    num_tokens: int,
    num_sequences: int = 1,
    skew: float = SKEW,
    reuse: float = REUSE,
    seed: int = 0,
) -> Trace:
    """num_experts: of each layer. num_tokens: of each sequence.

    skew: an expert's popularity is its rank in its layer to the power of minus this; 0 is an even load.
    reuse: the probability that an expert of the last token is kept; the others are drawn by popularity.
    """
    random = np.random.default_rng(seed)
    popularity = np.full((len(num_experts), max(num_experts)), -np.inf)  # of experts that a layer does not have
    for layer, count in enumerate(num_experts):
        ranks = np.arange(1, count + 1, dtype=np.float64)
        popularity[layer, :count] = random.permutation(-skew * np.log(ranks))
    experts = np.empty((num_sequences * num_tokens, len(num_experts), top_k), dtype=np.int16)
    for row in range(len(experts)):
        scores = popularity + random.gumbel(size=popularity.shape)  # the largest k: k draws without replacement
        if row % num_tokens:
            last = experts[row - 1]
            kept = random.random(last.shape) < reuse
            bonus = np.zeros_like(scores)
            np.put_along_axis(bonus, last.astype(np.intp), np.where(kept, np.inf, 0.0), axis=1)
            scores += bonus
        experts[row] = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    return Trace(
        experts=experts,
        **layer_sizes(num_experts),
        sequence_lengths=np.full(num_sequences, num_tokens),
        metadata=json.dumps({"model": f"synthetic, skew {skew}, reuse {reuse}, seed {seed}"}),
    )
