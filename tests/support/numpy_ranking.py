"""The ranking of the default policy in numpy: what `csrc/ranking.c` has to compute.

The same numbers, up to rounding and to which of equally near neighbours is taken.
Shapes: X all experts of the pool, M remembered tokens, D features.
"""

import numpy as np
from numpy.typing import NDArray

from offload_moe.residency.policy.history import NUM_NEIGHBOURS, SHARPNESS, History
from offload_moe.residency.policy.ranking import Passed, Ranking
from offload_moe.residency.policy.reuse import SHRINKAGE, ReuseModel

NUM_COLUMNS = 64
Vector = NDArray[np.float32]


class NumpyRanking(Ranking):
    def rank(self, passed: Passed) -> None:
        first, end = passed.first, passed.end
        keys = np.array(passed.keys, dtype=np.intp)
        used = np.zeros(end - first, dtype=np.float32)
        used[keys - first] = passed.shares
        if passed.observes:
            observe(self.history, keys, passed.num_layers)
        predicted, trust = predict(self.history, first, end)
        worth = update(
            self.reuse, first, end, used, predicted, trust, learn=passed.learns, num_tokens=passed.num_tokens
        )
        self.worth[first:end] = worth
        np.add(worth * self.discount, self.absent[first:end], out=self.order[first:end])


def observe(history: History, keys: NDArray[np.intp], num_layers: int) -> None:
    """Compare the past with what `num_layers` layers of the present token used, and store that."""
    history.matched *= history.fade(len(keys), num_layers)
    history.matched += np.add.reduce(history.was_used[keys], axis=0, dtype=np.uint8 if len(keys) < 256 else np.uint16)
    history.used[keys] = 1


def predict(history: History, first: int, end: int) -> tuple[Vector, float]:
    """For keys `first` to `end`: discounted reuse after the neighbours, a weighted sum; the sum of the weights."""
    nearest = _nearest(history.matched)
    weights = (history.matched[nearest] * (1.0 / history.matchable)) ** SHARPNESS
    reuse = (weights * np.float32(1 / 255)) @ history.future[nearest, first:end].astype(np.float32)
    return reuse, sum(weights.tolist())


def _nearest(matched: Vector) -> NDArray[np.intp]:
    """The best match of each of the best columns: a top-N that is four times faster and misses little."""
    columns = matched.reshape(-1, NUM_COLUMNS)
    best = columns.max(axis=0).argpartition(-NUM_NEIGHBOURS)[-NUM_NEIGHBOURS:]
    return columns[:, best].argmax(axis=0) * NUM_COLUMNS + best


def update(
    reuse: ReuseModel,
    first: int,
    end: int,
    used: Vector,
    predicted: Vector,
    trust: float,
    *,
    learn: bool,
    num_tokens: int = 1,
) -> Vector:
    """Expected discounted reuse of keys `first` to `end`, whose layers the present token has just passed.

    used: 1.0 where this token used the expert, or the share of a chunk's tokens that did; predicted, trust: from the
    neighbours.
    """
    features = reuse.features[:, first:end]
    learn = learn and reuse.is_learning
    before = features.copy() if learn else features
    frequencies = features[1:4]
    slow_step, fast_step = reuse.steps(num_tokens)
    frequencies += np.array([[slow_step], [fast_step], [1.0]], np.float32) * (used - frequencies)
    share = 1.0 / (trust + SHRINKAGE)
    np.multiply(predicted, share, out=features[4])
    np.multiply(features[1], SHRINKAGE * share, out=features[5])
    if learn:
        reuse.covariance += before @ (before - (reuse.discount * (1.0 - used)) * features).T
        reuse.evidence += before @ used
    return reuse.weights @ features
