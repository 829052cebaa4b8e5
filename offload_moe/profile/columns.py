"""From what was put aside while recording to the arrays of a trace.

T tokens, F forwards, L MoE layers, K top-k, E experts per layer, R tiers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload_moe.profile.routers import Router, pad_experts
from offload_moe.trace import DELAYED_HIT, HIT, MISS, Trace

Array = NDArray[Any]
Columns = dict[str, Array | None]
PER_TOKEN = ("experts", "weights", "router_probabilities", "token_ids", "is_prompt", "outcomes", "computed_on_cpu")
PER_FORWARD = ("stall_s", "loaded_bytes", "prefetch_issued", "prefetch_useful", "compute_s", "forward_s")

SECONDS, USEFUL, STALL = 0, 1, 2  # columns of a mark; the stalls of R tiers are followed by their bytes


@dataclass(slots=True, kw_only=True)
class Forward:
    """One forward as it was put aside. A mark is a row of running totals, see `Recorder`."""

    input_ids: Tensor
    start: int
    is_new: bool
    num_tiers: int
    began: tuple[float, ...] = ()
    ended: tuple[float, ...] = ()
    layers: list[int] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    begins: list[tuple[float, ...]] = field(default_factory=list)
    ends: list[tuple[float, ...]] = field(default_factory=list)
    routers: dict[int, Any] = field(default_factory=dict)
    outcomes: list[list[tuple[int, Sequence[int], Sequence[int]]]] = field(init=False)
    prefetches: list[list[tuple[int, int]]] = field(init=False)

    def __post_init__(self) -> None:
        self.outcomes = [[] for _ in range(self.num_tiers)]
        self.prefetches = [[] for _ in range(self.num_tiers)]

    def is_complete(self, num_layers: int) -> bool:
        """Whether every MoE layer ran once, in order, on every token."""
        num_tokens = self.input_ids.shape[1]
        return (
            self.layers == list(range(num_layers))
            and len(self.ends) == num_layers
            and all(len(index) == num_tokens for index in self.index)
        )


def to_columns(forwards: Sequence[Forward], routers: Sequence[Router | None], num_experts: int) -> Columns:
    """The arrays of some forwards, and how many tokens each had and whether a sequence began with it."""
    num_tokens = np.array([forward.input_ids.shape[1] for forward in forwards])
    experts = _join([forward.index for forward in forwards]).numpy().astype(np.min_scalar_type(num_experts))
    columns = [_measured(forward, forward.num_tiers) for forward in forwards]
    each = np.split(experts, np.cumsum(num_tokens)[:-1])
    is_on_cpu = forwards[0].index[0].device.type == "cpu"
    return {
        "experts": experts,
        "weights": _join([forward.weights for forward in forwards]).float().numpy().astype(np.float16),
        "router_probabilities": _probabilities(forwards, routers, num_experts),
        "token_ids": torch.cat([forward.input_ids[0] for forward in forwards]).cpu().numpy().astype(np.int32),
        "outcomes": np.concatenate([_outcomes(f, ids, num_experts) for f, ids in zip(forwards, each, strict=True)]),
        "is_prompt": np.repeat([_is_prompt(forward) for forward in forwards], num_tokens),
        "computed_on_cpu": np.full(experts.shape, is_on_cpu),
        "num_tokens": num_tokens,
        "is_new": np.array([forward.is_new for forward in forwards]),
        **{name: np.stack([column[name] for column in columns]) for name in PER_FORWARD},
    }


def make_trace(chunks: Sequence[Columns], *, num_experts: int, tiers: tuple[str, ...], metadata: str) -> Trace:
    """Every chunk in one trace. Router probabilities are left out unless every chunk has them."""
    joined: dict[str, Any] = {}
    for name in (*PER_TOKEN, *PER_FORWARD, "num_tokens", "is_new"):
        parts = [chunk[name] for chunk in chunks]
        present = [part for part in parts if part is not None]
        joined[name] = np.concatenate(present) if len(present) == len(parts) else None
    num_tokens, is_new = joined.pop("num_tokens"), joined.pop("is_new")
    is_new[0] = True
    lengths = np.add.reduceat(num_tokens, np.flatnonzero(is_new))
    forwards = np.repeat(np.arange(len(num_tokens)), num_tokens)
    return Trace(
        num_experts=num_experts,
        sequence_lengths=lengths,
        forwards=forwards,
        tiers=tiers,
        metadata=metadata,
        **joined,
    )


def _join(forwards: Sequence[Sequence[Tensor]]) -> Tensor:
    """For each forward L tensors ``[t, K]`` -> ``[T, L, K]``, brought to the host at once."""
    layers = [torch.cat(layer) for layer in zip(*forwards, strict=True)]
    return torch.stack(layers, dim=1).detach().cpu()


def _is_prompt(forward: Forward) -> bool:
    return forward.start == 0 or forward.input_ids.shape[1] > 1


def _outcomes(forward: Forward, experts: Array, num_experts: int) -> Array:
    """[T, L, K, R]. What a tier was not asked for, because a faster one had it, counts as a hit there."""
    found = np.empty((*experts.shape, forward.num_tiers), dtype=np.uint8)
    layers = np.arange(experts.shape[1])[:, None]
    for tier, notes in enumerate(forward.outcomes):
        codes = np.full((experts.shape[1], num_experts), HIT, dtype=np.uint8)
        for layer, arriving, missing in notes:
            codes[layer, arriving] = DELAYED_HIT
            codes[layer, missing] = MISS
        found[..., tier] = codes[layers, experts]
    return found


def _measured(forward: Forward, num_tiers: int) -> dict[str, Array]:
    """Seconds and counts per layer; see the table of docs/profile.md for what belongs to which layer."""
    begins, ends = np.array(forward.begins), np.array(forward.ends)
    spent = ends - begins
    first_bytes = STALL + num_tiers
    marks = np.vstack([forward.began, begins[1:], forward.ended])
    stall = _split_stall(spent[:, STALL:first_bytes])
    issued = np.zeros((len(begins), num_tiers), dtype=np.int32)
    for tier, notes in enumerate(forward.prefetches):
        for layer, num_started in notes:
            issued[layer, tier] += num_started
    useful = np.zeros_like(issued)
    useful[:, 0] = spent[:, USEFUL]
    return {
        "stall_s": stall,
        "loaded_bytes": np.diff(marks[:, first_bytes:], axis=0).astype(np.int64),
        "prefetch_issued": issued,
        "prefetch_useful": useful,
        "compute_s": spent[:, SECONDS] - stall.sum(axis=1),
        "forward_s": np.float64(forward.ended[SECONDS] - forward.began[SECONDS]),
    }


def _split_stall(waited: Array) -> Array:
    """[L, R]: what compute waited for the fastest tier, each second given to the slowest tier that was waited for.

    A slower tier is waited for by several loaders at once, so its seconds may be more than compute lost.
    """
    split = np.zeros_like(waited)
    left = waited[:, 0].copy()
    for tier in range(waited.shape[1] - 1, 0, -1):
        split[:, tier] = np.minimum(left, waited[:, tier])
        left -= split[:, tier]
    split[:, 0] = left
    return split


def _probabilities(forwards: Sequence[Forward], routers: Sequence[Router | None], num_experts: int) -> Array | None:
    """[T, L, E] in fp16, or None where a layer has no router that gives scores."""
    found = []
    for layer, router in enumerate(routers):
        if router is None:
            return None
        scores = [router.scores(forward.routers.get(layer), forward.input_ids.shape[1]) for forward in forwards]
        known = [part for part in scores if part is not None]
        if len(known) < len(forwards):
            return None
        found.append(pad_experts(router.probabilities(torch.cat(known)), num_experts))
    stacked: Array = torch.stack(found, dim=1).cpu().numpy().astype(np.float16)
    return stacked
