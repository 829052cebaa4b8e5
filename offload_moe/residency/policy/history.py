"""The routing of the last tokens, and what followed tokens that were routed like the present one.

Shapes: X all experts of the pool (layers x experts per layer), M remembered tokens, N neighbours.
"""

import numpy as np
from numpy.typing import NDArray

NUM_TOKENS = 1024  # remembered; more finds rarer repetitions and costs time
NUM_NEIGHBOURS = 8
NUM_AHEAD = 16  # tokens after a neighbour that count as its future
LAYER_DECAY = 0.9  # a match weighs this much less per layer it lies back
TOKEN_DECAY = 0.6  # and this much less per token, beyond its layers
NUM_COLUMNS = 64  # a divisor of NUM_TOKENS
LEAST_MATCHABLE = 1e-6
SHARPNESS = 6  # exponent that turns a matched share into a neighbour's weight


class History:
    """A ring of tokens: `observe` what layers just passed used, ask what it `foretells`, `advance` to the next token.

    Source: nearest neighbours over routing, as induction heads do over tokens (Olsson et al., 2022, arXiv:2209.11895).
    """

    def __init__(self, num_keys: int, discount: float, num_tokens: int = NUM_TOKENS) -> None:
        self.used = np.zeros(num_keys, dtype=np.uint8)  # [X]: by the present token, 0 or 1
        self.was_used = np.zeros((num_keys, num_tokens), dtype=np.uint8)  # [X, M]
        # [M, X]: 255 * discount^(tokens from the token after until the first use)
        self.future = np.zeros((num_tokens, num_keys), dtype=np.uint8)
        self.use_discount(discount)
        self.matched = np.zeros(num_tokens, dtype=np.float32)  # [M]: decayed count of experts shared with the present
        self.matchable = LEAST_MATCHABLE  # what a token with the same routing would have
        self._now = 0

    def use_discount(self, discount: float) -> None:
        """Of the uses from now on; what is remembered keeps the one it had."""
        self._fading = [np.uint8(round(255 * discount**wait)) for wait in range(NUM_AHEAD)]

    def observe(self, keys: NDArray[np.intp], num_layers: int) -> None:
        """Compare the past with what `num_layers` layers of the present token used, and remember that."""
        self.matched *= self.fade(len(keys), num_layers)
        self.matched += np.add.reduce(self.was_used[keys], axis=0, dtype=np.uint8 if len(keys) < 256 else np.uint16)
        self.used[keys] = 1

    def fade(self, num_used: int, num_layers: int) -> float:
        """Begin an `observe`; what is left of matches so far."""
        decay = LAYER_DECAY**num_layers
        self.matchable = self.matchable * decay + num_used
        return decay

    def foretells(self, first: int, end: int) -> tuple[NDArray[np.float32], float]:
        """For keys `first` to `end`: discounted reuse after the neighbours, a weighted sum; the sum of the weights."""
        nearest = self._nearest()
        weights = (self.matched[nearest] * (1.0 / self.matchable)) ** SHARPNESS
        reuse = (weights * _PER_255) @ self.future[nearest, first:end].astype(np.float32)
        return reuse, sum(weights.tolist())

    def _nearest(self) -> NDArray[np.intp]:
        """The best match of each of the best columns: a top-N that is four times faster and misses little."""
        columns = self.matched.reshape(-1, NUM_COLUMNS)
        best = columns.max(axis=0).argpartition(-NUM_NEIGHBOURS)[-NUM_NEIGHBOURS:]
        return columns[:, best].argmax(axis=0) * NUM_COLUMNS + best

    def advance(self) -> None:
        """Go on to the next token: the present becomes the future of its predecessors, and the oldest is forgotten."""
        now, used = self._now, self.used
        for wait, fading in enumerate(self._fading):
            row = self.future[now - 1 - wait]
            np.maximum(row, used * fading, out=row)
        self.was_used[:, now] = used
        used[:] = 0
        self.future[now] = 0
        carried = self.matched * np.float32(TOKEN_DECAY)
        self.matched[1:], self.matched[0] = carried[:-1], carried[-1]
        self.matched[now] = 0.0  # its future is still unknown
        self.matchable = max(self.matchable * TOKEN_DECAY, LEAST_MATCHABLE)  # chunks observe nothing
        self._now = (now + 1) % len(self.matched)


_PER_255 = np.float32(1 / 255)
