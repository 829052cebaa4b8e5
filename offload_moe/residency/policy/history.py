"""The routing of the last tokens, and of the tokens that followed them.

Shapes: X all experts of the pool (layers x experts per layer), M stored tokens, N neighbours.
"""

import numpy as np

NUM_TOKENS = 1024  # stored; more of them find rarer repetitions and cost time
NUM_NEIGHBOURS = 8
NUM_AHEAD = 16  # tokens after a neighbour that count as its future
LAYER_DECAY = 0.9  # a match weighs this much less per layer that it lies back
TOKEN_DECAY = 0.6  # and this much less per token, beyond its layers
LEAST_MATCHABLE = 1e-6
SHARPNESS = 6  # exponent that turns a matched share into a neighbour's weight


class History:
    """A ring of tokens, which `csrc/ranking.c` compares with the present one and writes; `advance` begins the next.

    Source: nearest neighbours over routing, as induction heads do over tokens (Olsson et al., 2022, arXiv:2209.11895).
    """

    def __init__(self, num_keys: int, discount: float, num_tokens: int = NUM_TOKENS) -> None:
        self.used = np.zeros(num_keys, dtype=np.uint8)  # [X]: by the present token, 0 or 1
        self.was_used = np.zeros((num_keys, num_tokens), dtype=np.uint8)  # [X, M]
        # [M, X]: 255 * discount^(tokens from the token after until the first use)
        self.future = np.zeros((num_tokens, num_keys), dtype=np.uint8)
        self.use_discount(discount)
        self.matched = np.zeros(num_tokens, dtype=np.float32)  # [M]: decayed count of experts shared with the present
        self.matchable = LEAST_MATCHABLE  # `matched` of a token with the same routing
        self._now = 0

    def use_discount(self, discount: float) -> None:
        """Discount uses by this from now on; stored futures keep theirs."""
        self._fading = [np.uint8(round(255 * discount**wait)) for wait in range(NUM_AHEAD)]

    def fade(self, num_used: int, num_layers: int) -> float:
        """Age the matches before more layers are compared. Returns the factor for the matches so far."""
        decay = LAYER_DECAY**num_layers
        self.matchable = self.matchable * decay + num_used
        return decay

    def advance(self) -> None:
        """Begin the next token: the present one enters the future of its predecessors and replaces the oldest."""
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
        self.matchable = max(self.matchable * TOKEN_DECAY, LEAST_MATCHABLE)  # chunks add nothing to it
        self._now = (now + 1) % len(self.matched)
