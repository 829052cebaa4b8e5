"""Co-occurrence of experts: predicts those of later layers from those that this layer chose. Imports no torch.

For families whose routers cannot be evaluated ahead. Shapes: E experts per layer.

Source: the idea of expert activation matrices, Xue et al. 2024, "MoE-Infinity", arXiv:2401.14361, section 4.
"""

from collections.abc import Sequence

import numpy as np

LEAST_TOKENS = 16  # before the first prediction
FADE_TOKENS = 2048  # after which all counts are halved


class CoOccurrence:
    """Counts, for each layer and depth, of experts that one token used together; learned while the model decodes."""

    def __init__(self, num_layers: int, num_experts: int, depth: int) -> None:
        self._num_layers = num_layers
        self._depth = depth
        self._counts = np.zeros((depth, num_layers, num_experts, num_experts), dtype=np.float32)
        self._recent: dict[int, list[int]] = {}  # the present token's experts, by layer
        self._num_tokens = 0

    def learn(self, layer: int, experts: Sequence[int]) -> None:
        """Add the experts of a layer; called layer by layer, for each token in turn."""
        if layer == 0:
            self._recent.clear()
            self._num_tokens += 1
            if self._num_tokens % FADE_TOKENS == 0:
                self._counts *= 0.5
        now = list(experts)
        for depth in range(1, self._depth + 1):
            before = self._recent.get(layer - depth)
            if before:
                self._counts[depth - 1, layer - depth][np.ix_(before, now)] += 1.0
        self._recent[layer] = now

    def predict(self, layer: int, experts: Sequence[int], depth: int, num_most: int) -> list[int]:
        """Experts of layer ``layer + depth``, the likeliest first; empty before `LEAST_TOKENS` tokens."""
        if self._num_tokens <= LEAST_TOKENS or depth > self._depth:
            return []
        scores = self._counts[depth - 1, layer, list(experts)].sum(axis=0)
        best = np.argsort(-scores, kind="stable")[:num_most]
        return [int(expert) for expert in best if scores[expert] > 0]
