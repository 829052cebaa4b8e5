"""The default policy: keep the experts that were used next when the routing was last like this."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy.ranking import Passed, Ranking, Span

HALF_LIFE_PER_SHARE = 10.0  # tokens until a reuse is worth half, in a pool with a slot for every expert
LAYERS_PER_RANKING = 2  # that many layers are ranked at once: fewer calls, slightly staler ranks
PREFETCH_WORTH = 0.8  # of an expert that a prefetch brought, until its layer has been passed
AHEAD_OF_CHUNK = 1.0  # more than anything that waits for the next token is worth


class KNN:
    """Evicts the expert with the lowest expected `discount ** (tokens until the next use)`.

    The more of the experts fit, the longer they stay, and the longer the horizon that pays: that sets the discount. An
    expert whose layer this token has passed waits one token longer than its worth assumes, so it counts that much less.
    A token ends when an earlier layer than the last is accessed, or in a pool of one layer with each access.

    A victim is one argmin over the pool's experts. A chunk that uses more than half of a layer's experts shows no
    co-occurrence and stays out of the history; the number of its tokens that chose each expert counts.
    """

    name = "knn"

    def __init__(self, keys: ExpertKeys, layers: range, num_slots: int) -> None:
        """layers: the pool's; internally, their keys begin at 0."""
        self._layers = layers
        self._first_key = keys.first(layers.start)
        self._local = ExpertKeys(keys.num_experts[layers.start : layers.stop])
        self._num_keys = self._local.total
        self.ranking = Ranking(self._num_keys, _discount(self._num_keys, num_slots))
        self._pending: list[int] = []  # used by layers not ranked yet, from position `_ranked` on
        self._shares: list[float] = []  # of the tokens that used them
        self._num_tokens = 1  # of the last access
        self._ranked = 0
        self._position = -1  # of the layer accessed last
        self._is_chunk = False
        self._is_partial = False  # the layer accessed last is acquired expert by expert
        self._current: frozenset[int] = frozenset()
        self._shape: tuple[int, ...] = ()  # of the last `access_token`: how many experts of each layer
        self._spans: Sequence[Span] = ()

    @property
    def worths(self) -> NDArray[np.float32]:
        """See `Appraising`, for a pool of all layers."""
        return self.ranking.worth

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        position = layer - self._layers.start
        if position < self._position or len(self._layers) == 1:
            self._next_token()
        self._is_partial = position == self._position
        self._ranked = min(self._ranked, position)
        self._position = position
        first_key = self._first_key
        local = [key - first_key for key in keys] if first_key else keys
        self._current = frozenset(local)
        self._pending += local
        self._shares += weights if weights and num_tokens > 1 else [1.0] * len(keys)
        self._num_tokens = num_tokens
        if 2 * len(keys) > self._local.num_experts[position] and not self._is_chunk:
            self._is_chunk = True
            # A chunk uses nearly all experts of the layers ahead, and uses them before any of the layers behind.
            self.ranking.order[self._local.end(position) :] += AHEAD_OF_CHUNK
        if position + 1 - self._ranked >= LAYERS_PER_RANKING or position + 1 == len(self._layers):
            self._rank_pending()

    def access_token(self, layer: int, keys: Sequence[Sequence[int]]) -> None:
        """See `OfTokens`."""
        shape = tuple(map(len, keys))
        if shape != self._shape:
            self._shape, self._spans = shape, self._spans_of(shape)
        if not self._spans or layer != self._layers.start or self._position <= 0:
            for number, each in enumerate(keys, layer):
                self.access(number, each)
            return
        self._next_token()
        first = self._first_key
        self.ranking.rank_token([key - first for each in keys for key in each], self._spans)
        self._current = frozenset(key - first for key in keys[-1])
        self._num_tokens, self._is_partial = 1, False
        self._position, self._ranked = len(keys) - 1, len(keys)

    def _spans_of(self, shape: Sequence[int]) -> Sequence[Span]:
        """Of a token that uses so many experts of each layer; none where a layer is missing, or counts as a chunk's."""
        local = self._local
        if len(shape) != len(self._layers) or any(
            2 * used > count for used, count in zip(shape, local.num_experts, strict=True)
        ):
            return ()
        ends = [min(at + LAYERS_PER_RANKING, len(shape)) for at in range(0, len(shape), LAYERS_PER_RANKING)]
        return [
            Span(sum(shape[at:end]), local.first(at), local.first(end), end - at)
            for at, end in zip([0, *ends], ends, strict=False)
        ]

    def insert(self, key: int) -> None:
        local = key - self._first_key
        ranking = self.ranking
        ranking.absent[local] = 0.0
        if local not in self._current:
            ranking.worth[local] = PREFETCH_WORTH
        has_passed = local < self._local.first(self._ranked)
        is_awaited = self._is_chunk and local >= self._local.end(self._position)
        worth = ranking.worth[local] * (ranking.discount if has_passed else 1.0)
        ranking.order[local] = worth + AHEAD_OF_CHUNK * is_awaited

    def remove(self, key: int) -> None:
        local = key - self._first_key
        self.ranking.absent[local] = self.ranking.order[local] = np.inf

    def resize(self, num_slots: int) -> None:
        """Use a longer or shorter horizon from now on; what was learned with the last discount fades."""
        self.ranking.use_discount(_discount(self._num_keys, num_slots))

    def victim(self, leased: Callable[[int], bool]) -> int | None:
        order, spared, chosen = self.ranking.order, [], None
        while chosen is None:
            local = int(order.argmin())
            worth = order[local]
            if worth == np.inf:
                break
            if leased(local + self._first_key):
                spared.append((local, worth))
                order[local] = np.inf
            else:
                chosen = local + self._first_key
        for local, worth in spared:
            order[local] = worth
        return chosen

    def _rank_pending(self) -> None:
        """Learn from the layers passed since the last ranking, and rank their experts for the next token."""
        first, end = self._ranked, self._position + 1
        self.ranking.rank(
            Passed(
                keys=self._pending,
                shares=self._shares,
                first=self._local.first(first),
                end=self._local.first(end),
                num_layers=end - first,
                num_tokens=self._num_tokens,
                observes=not self._is_chunk,
                learns=not (self._is_chunk or self._is_partial),
            )
        )
        self._pending, self._shares = [], []
        self._ranked = self._position + 1

    def _next_token(self) -> None:
        if self._pending:
            self._rank_pending()
        self.ranking.advance()
        self._position = -1
        self._ranked = 0
        self._is_chunk = False


def _discount(num_keys: int, num_slots: int) -> float:
    """Of one token, for a pool of `num_slots` slots."""
    return float(0.5 ** (num_keys / (num_slots * HALF_LIFE_PER_SHARE)))
