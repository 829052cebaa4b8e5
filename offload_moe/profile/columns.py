"""From collected tensors and counters to the arrays of a trace.

T tokens, F forwards, L MoE layers, K top-k, E experts per layer, R tiers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload_moe.experts.attach import SpannedLayers
from offload_moe.profile.routers import Router, pad_experts
from offload_moe.profile.trace import DELAYED_HIT, HIT, MISS, Trace, layer_sizes

Array = NDArray[Any]
Columns = dict[str, Array | None]
Mark = tuple[float, ...]  # seconds, useful prefetches, then stalls and bytes of every tier: running totals
PER_TOKEN = ("experts", "weights", "router_probabilities", "token_ids", "is_prompt", "outcomes", "computed_on_cpu")
PER_FORWARD = ("stall_s", "loaded_bytes", "prefetch_issued", "prefetch_useful", "compute_s", "forward_s")

SECONDS, USEFUL, STALL = 0, 1, 2  # columns of a mark; R stalls are followed by R times bytes


@dataclass(slots=True, kw_only=True)
class Forward:
    """One forward in progress."""

    input_ids: Tensor
    start: int
    is_new: bool
    num_tiers: int
    num_layers: int
    began: Mark = ()
    calls: list[tuple[int, Tensor, Tensor, Mark]] = field(default_factory=list)  # layer, top-k ids, weights, begin
    ends: list[Mark] = field(default_factory=list)
    scores: dict[int, Tensor | None] = field(default_factory=dict)
    outcomes: list[list[tuple[int, Sequence[int], Sequence[int]]]] = field(init=False)
    prefetches: list[list[tuple[int, int]]] = field(init=False)
    on_cpu: list[tuple[int, Sequence[int]]] = field(default_factory=list)  # layer, experts: with a device tier
    whole: tuple[SpannedLayers, Mark] | None = None  # all layers of a token pass, with the totals afterwards

    def __post_init__(self) -> None:
        self.outcomes = [[] for _ in range(self.num_tiers)]
        self.prefetches = [[] for _ in range(self.num_tiers)]

    def add_span(self, layers: SpannedLayers, mark: Mark) -> None:
        """One token through several layers; mark: the totals afterwards."""
        if not self.calls and self.whole is None and len(layers.ids) == self.num_layers:
            self.whole = layers, mark
            return
        marks = _marks_of(layers, mark).tolist()
        said = (part.split(1) for part in (layers.ids, layers.weights, layers.logits))
        for layer, (ids, weights, logits, begin, end) in enumerate(zip(*said, *marks, strict=True), layers.first_layer):
            self.scores[layer] = logits
            self.calls.append((layer, ids, weights, tuple(begin)))
            self.ends.append(tuple(end))

    def is_complete(self) -> bool:
        """Whether every MoE layer ran once, in order, on every token."""
        if self.whole is not None:
            return not self.calls
        num_layers = self.num_layers
        num_tokens = self.input_ids.shape[1]
        checked = self.calls if num_tokens > 1 else self.calls[:1]  # all: as slow as the rest
        return (
            [call[0] for call in self.calls] == list(range(num_layers))
            and len(self.ends) == num_layers
            and all(len(call[1]) == num_tokens for call in checked)
        )

    def pack(self, ended: Mark, num_experts: int) -> "PackedForward":
        """Keep only the arrays' data, which leaves fewer objects to the garbage collector."""
        scores: Sequence[Tensor | None]
        if self.whole is not None:
            span, mark = self.whole
            index, weights, scores = span.ids[None], span.weights[None], span.logits[None].unbind(1)
            marks = _marks_of(span, mark)
        else:
            layers, all_ids, all_weights, begins = zip(*self.calls, strict=True)
            index, weights = torch.stack(all_ids, dim=1), torch.stack(all_weights, dim=1)
            scores = [self.scores.get(layer) for layer in layers]
            marks = np.array([begins, self.ends])
        return PackedForward(
            input_ids=self.input_ids[0],
            is_prompt=self.start == 0 or self.input_ids.shape[1] > 1,
            is_new=self.is_new,
            index=index,
            weights=weights,
            scores=scores,
            ends=np.array([self.began, ended]),
            marks=marks,
            codes=[self._codes(notes, num_experts) if notes else None for notes in self.outcomes],
            issued=self._issued(),
            on_cpu=self._codes(((layer, [], experts) for layer, experts in self.on_cpu), num_experts) == MISS
            if self.on_cpu
            else None,
        )

    def _codes(self, notes: Iterable[tuple[int, Sequence[int], Sequence[int]]], num_experts: int) -> Array:
        codes = np.full((self.num_layers, num_experts), HIT, dtype=np.uint8)
        for layer, arriving, missing in notes:
            codes[layer, arriving] = DELAYED_HIT
            codes[layer, missing] = MISS
        return codes

    def _issued(self) -> Array:
        issued = np.zeros((self.num_layers, self.num_tiers), dtype=np.int32)
        for tier, notes in enumerate(self.prefetches):
            for layer, num_started in notes:
                issued[layer, tier] += num_started
        return issued


def _marks_of(span: SpannedLayers, mark: Mark) -> Array:
    """[2, L, C]: the marks before and after each layer of a token pass; mark: afterwards. Passes have one tier."""
    marks = np.empty((2, len(span.ids), len(mark)))
    stalled = mark[STALL] - span.stalls.sum().item() + np.cumsum(span.stalls.numpy())
    marks[:, :, SECONDS] = span.times.numpy().T
    marks[0, :, USEFUL], marks[1, :, USEFUL] = span.num_useful[:-1], span.num_useful[1:]
    marks[0, :, STALL], marks[1, :, STALL] = stalled - span.stalls.numpy(), stalled
    marks[0, :, STALL + 1], marks[1, :, STALL + 1] = span.disk_bytes[:-1], span.disk_bytes[1:]
    return marks


@dataclass(slots=True, kw_only=True)
class PackedForward:
    """One finished forward. t: its tokens, C: the columns of a mark."""

    input_ids: Tensor  # [t]
    is_prompt: bool
    is_new: bool
    index: Tensor  # [t, L, K]
    weights: Tensor  # [t, L, K]
    scores: Sequence[Tensor | None]  # per layer [t, E], the router's output
    ends: Array  # [2, C]: the marks before and after the forward
    marks: Array  # [2, L, C]: the marks before and after each layer
    codes: list[Array | None]  # per tier [L, E]: HIT, DELAYED_HIT or MISS; None if all were hits
    issued: Array  # [L, R] prefetches
    on_cpu: Array | None  # [L, E] bool: computed on the CPU beside a device; None if no expert was


def to_columns(forwards: Sequence[PackedForward], routers: Sequence[Router | None], num_experts: int) -> Columns:
    """The arrays of some forwards, the number of tokens of each, and whether a sequence began with it."""
    num_tokens = np.array([len(forward.input_ids) for forward in forwards])
    experts = _join([forward.index for forward in forwards]).numpy().astype(np.min_scalar_type(num_experts))
    weights = _join([forward.weights for forward in forwards]).float().numpy()
    return {
        "experts": experts,
        "weights": weights.astype(np.float16),
        "router_probabilities": _probabilities(forwards, routers, num_experts),
        "token_ids": torch.cat([forward.input_ids for forward in forwards]).cpu().numpy().astype(np.int32),
        "outcomes": _outcomes(forwards, experts),
        "is_prompt": np.repeat([forward.is_prompt for forward in forwards], num_tokens),
        "computed_on_cpu": _computed_on_cpu(forwards, experts),
        "num_tokens": num_tokens,
        "is_new": np.array([forward.is_new for forward in forwards]),
        **_measured(forwards),
    }


def make_trace(
    chunks: Sequence[Columns], *, num_experts: Sequence[int], tiers: tuple[str, ...], metadata: str
) -> Trace:
    """Every chunk in one trace. num_experts: of each layer.

    Router probabilities are left out unless every chunk has them.
    """
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
        **layer_sizes(num_experts),
        sequence_lengths=lengths,
        forwards=forwards,
        tiers=tiers,
        metadata=metadata,
        **joined,
    )


def _join(forwards: Sequence[Tensor]) -> Tensor:
    """For each forward ``[t, L, K]`` -> ``[T, L, K]``, copied to the host at once."""
    return torch.cat(tuple(forwards)).detach().cpu()


def _outcomes(forwards: Sequence[PackedForward], experts: Array) -> Array:
    """[T, L, K, R]. An expert that a faster tier had counts as a hit in the slower ones."""
    found = np.full((*experts.shape, len(forwards[0].codes)), HIT, dtype=np.uint8)
    layers, row = np.arange(experts.shape[1])[:, None], 0
    for forward in forwards:
        rows = slice(row, row + len(forward.input_ids))
        row = rows.stop
        for tier, codes in enumerate(forward.codes):
            if codes is not None:
                found[rows, ..., tier] = codes[layers, experts[rows]]
    return found


def _computed_on_cpu(forwards: Sequence[PackedForward], experts: Array) -> Array:
    """[T, L, K] bool. With a device tier (two tiers) only the CPU's share; without one, everything."""
    has_device = len(forwards[0].codes) > 1
    found = np.full(experts.shape, not has_device)
    layers, row = np.arange(experts.shape[1])[:, None], 0
    for forward in forwards:
        rows = slice(row, row + len(forward.input_ids))
        row = rows.stop
        if forward.on_cpu is not None:
            found[rows] = forward.on_cpu[layers, experts[rows]]
    return found


def _measured(forwards: Sequence[PackedForward]) -> Columns:
    """Seconds and counts per forward and layer; docs/profile.md defines their assignment to layers."""
    first_bytes = STALL + len(forwards[0].codes)
    marks, ends = np.stack([f.marks for f in forwards]), np.stack([f.ends for f in forwards])  # [F, 2, L, C], [F, 2, C]
    spent = marks[:, 1] - marks[:, 0]
    moved = np.concatenate([ends[:, :1], marks[:, 0, 1:], ends[:, 1:]], axis=1)[..., first_bytes:]
    stall = _split_stall(spent[..., STALL:first_bytes])
    issued = np.stack([forward.issued for forward in forwards])
    useful = np.zeros_like(issued)
    useful[..., 0] = spent[..., USEFUL]
    return {
        "stall_s": stall,
        "loaded_bytes": np.diff(moved, axis=1).astype(np.int64),
        "prefetch_issued": issued,
        "prefetch_useful": useful,
        "compute_s": spent[..., SECONDS] - stall.sum(axis=-1),
        "forward_s": ends[:, 1, SECONDS] - ends[:, 0, SECONDS],
    }


def _split_stall(waited: Array) -> Array:
    """[F, L, R]: compute's waits for the fastest tier, each second assigned to the slowest tier that caused it.

    Several loaders may wait for a slower tier at once, so its own seconds may exceed those of compute.
    """
    split = np.zeros_like(waited)
    left = waited[..., 0].copy()
    for tier in range(waited.shape[-1] - 1, 0, -1):
        split[..., tier] = np.minimum(left, waited[..., tier])
        left -= split[..., tier]
    split[..., 0] = left
    return split


def _probabilities(
    forwards: Sequence[PackedForward], routers: Sequence[Router | None], num_experts: int
) -> Array | None:
    """[T, L, E] in fp16, or None if a layer's router returns no scores."""
    found = []
    for layer, router in enumerate(routers):
        known = [score for forward in forwards if (score := forward.scores[layer]) is not None]
        if router is None or len(known) < len(forwards):
            return None
        found.append(pad_experts(router.probabilities(torch.cat(known)), num_experts))
    return torch.stack(found, dim=1).cpu().numpy().astype(np.float16)
