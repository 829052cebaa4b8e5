"""Dependences of routing: on the previous token, the kind of token, the kind of text, the previous layer.

T tokens, L MoE layers, E experts per layer, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload_moe.profile.trace import Trace

NUM_LISTED = 5
NUM_SUCCESSIONS = 12
LEAST_SUPPORT = 0.02  # minimum share of the tokens for a listed succession
LEAST_TOKENS = 5

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Share of a token's experts that the previous token used too, mean over tokens; one number per layer.

    by_chance: for two tokens drawn at random from this trace, which accounts for uneven load.
    """

    adjacent: list[float]
    by_chance: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Favourite:
    """An expert that one kind of tokens prefers. share: of these tokens; lift: times its share of all tokens."""

    layer: int
    expert: int
    share: float
    lift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """The routing of one kind of tokens. distance: total variation from all tokens' load, 0 to 1, per layer.

    distance_by_chance: the mean over layers with kinds assigned to the tokens at random.
    """

    name: str
    num_tokens: int
    distance: list[float]
    distance_by_chance: float
    favourites: list[Favourite]


@dataclass(frozen=True, slots=True, kw_only=True)
class Succession:
    """Expert `following` of the next layer after `expert` of `layer`. lift: over independent choices."""

    layer: int
    expert: int
    following: int
    num_tokens: int
    probability: float
    lift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Coactivation:
    """Pairs of experts in successive layers that are routed together.

    mean_lift: of the routed pairs, per layer except the last; 1 if layers choose independently.
    """

    mean_lift: list[float]
    strongest: list[Succession]


def overlap(trace: Trace) -> Overlap | None:
    """None when no sequence has two tokens."""
    is_first = np.zeros(trace.num_tokens, dtype=bool)
    starts = np.cumsum(trace.sequence_lengths) - trace.sequence_lengths
    is_first[starts[starts < trace.num_tokens].astype(np.intp)] = True
    later = np.flatnonzero(~is_first)
    if not len(later):
        return None
    same = trace.experts[later][..., :, None] == trace.experts[later - 1][..., None, :]
    adjacent = same.any(axis=-1).mean(axis=(0, 2))
    share = _shares(trace, slice(None))
    return Overlap(adjacent=adjacent.tolist(), by_chance=((share**2).sum(axis=1) / trace.top_k).tolist())


def preferences(trace: Trace, kinds: Sequence[str], kind_of: Array) -> list[Preference]:
    """The routing of each kind of tokens.

    kind_of: [T] index into `kinds`; kinds without a token are left out.
    """
    overall = _shares(trace, slice(None))
    even = trace.top_k / np.array(trace.keys.num_experts)[:, None]
    dealt = np.random.default_rng(0).permutation(kind_of)
    found = []
    for number, name in enumerate(kinds):
        rows = kind_of == number
        if rows.any():
            share, by_chance = _shares(trace, rows), _shares(trace, dealt == number)
            preference = Preference(
                name=name,
                num_tokens=int(rows.sum()),
                distance=_distance(share, overall, trace.top_k).tolist(),
                distance_by_chance=float(_distance(by_chance, overall, trace.top_k).mean()),
                favourites=_favourites(share, overall, even),
            )
            found.append(preference)
    return found


def coactivation(trace: Trace) -> Coactivation:
    mean_lift, found = [], []
    least = max(LEAST_TOKENS, LEAST_SUPPORT * trace.num_tokens)
    for layer in range(trace.num_layers - 1):
        before, after = _used(trace, layer), _used(trace, layer + 1)
        together = before.T @ after
        expected = np.outer(before.sum(axis=0), after.sum(axis=0)) / trace.num_tokens
        lift = np.divide(together, expected, out=np.zeros_like(together), where=expected > 0)
        mean_lift.append(float((together * lift).sum() / together.sum()))
        ranked = np.where(together >= least, lift, 0.0)
        for flat in np.argsort(ranked, axis=None)[::-1][:NUM_SUCCESSIONS]:
            expert, following = (int(number) for number in np.unravel_index(flat, lift.shape))
            if ranked[expert, following] > 0:
                succession = Succession(
                    layer=layer,
                    expert=expert,
                    following=following,
                    num_tokens=int(together[expert, following]),
                    probability=float(together[expert, following] / before[:, expert].sum()),
                    lift=float(lift[expert, following]),
                )
                found.append(succession)
    found.sort(key=lambda succession: -succession.lift)
    return Coactivation(mean_lift=mean_lift, strongest=found[:NUM_SUCCESSIONS])


def _shares(trace: Trace, rows: Array | slice) -> NDArray[np.float64]:
    """[L, E]: the share of the given tokens that were routed to each expert."""
    experts = trace.experts[rows]
    counts = [np.bincount(experts[:, layer].ravel(), minlength=trace.num_experts) for layer in range(experts.shape[1])]
    return np.stack(counts) / len(experts)


def _used(trace: Trace, layer: int) -> NDArray[np.float32]:
    """[T, E]: 1 where the token was routed to the expert."""
    used = np.zeros((trace.num_tokens, trace.num_experts), dtype=np.float32)
    np.put_along_axis(used, trace.experts[:, layer].astype(np.intp), 1.0, axis=1)
    return used


def _distance(share: Array, overall: Array, top_k: int) -> Array:
    """[L]: half the sum of absolute differences between two distributions of the load."""
    distance: Array = np.abs(share - overall).sum(axis=1) / (2 * top_k)
    return distance


def _favourites(share: Array, overall: Array, even: Array) -> list[Favourite]:
    """The highest lifts among the experts that these tokens use at least as much as an even load would have it.

    even: [L, 1].
    """
    lift = np.divide(share, overall, out=np.zeros_like(share), where=(overall > 0) & (share >= even))
    best = np.argsort(lift, axis=None)[::-1][:NUM_LISTED]
    places = [(int(flat) // lift.shape[1], int(flat) % lift.shape[1]) for flat in best]
    return [
        Favourite(layer=layer, expert=expert, share=float(share[layer, expert]), lift=float(lift[layer, expert]))
        for layer, expert in places
        if lift[layer, expert] > 1
    ]
