"""Predictions of later layers' routing, drawn at random.

L MoE layers, K top-k.
"""

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from offload_moe.residency.prefetch import PrefetchGovernor
from offload_moe.simulate.clock import VirtualClock
from offload_moe.simulate.costs import LookaheadModel

RECENT_TOKENS = 32  # recent tokens from which wrong predictions are drawn


class Guesser:
    """Each prediction is right with the recall's probability, else a recent expert. The runtime's governor decides."""

    def __init__(self, clock: VirtualClock, model: LookaheadModel) -> None:
        self._recall = model.recall
        self._recent: deque[NDArray[Any]] = deque(maxlen=RECENT_TOKENS)
        self._governor = PrefetchGovernor(clock)
        self._is_on = False
        self._random = random.Random(model.seed)

    def pause(self) -> None:
        """Reset the recent tokens, before the routing of another sequence."""
        self._governor.pause()

    def guesses(self, layer: int, experts: NDArray[Any]) -> list[tuple[int, list[int]]]:
        """experts ``[L, K]``, of the token. Returns later layers with the predicted experts of each."""
        if not self._recall:
            return []
        if layer == 0:
            self._recent.append(experts)
            self._is_on = self._governor.begin_token()
        if not self._is_on:
            return []
        behind = enumerate(self._recall, start=layer + 1)
        return [
            (ahead, self._guess(ahead, experts[ahead].tolist(), recall))
            for ahead, recall in behind
            if ahead < len(experts)
        ]

    def _guess(self, layer: int, truth: Sequence[int], recall: float) -> list[int]:
        """Wrong predictions are recent experts of the layer, because a router's errors favour its frequent choices."""
        draw = self._random
        wrong = draw.choice(self._recent)[layer].tolist()
        return sorted({expert if draw.random() < recall else draw.choice(wrong) for expert in truth})
