"""Recording: the choices of a model's routers during a run, and their costs.

During a forward tensors and counters are only collected; they become arrays every 64 forwards, see `columns`.
T tokens of one forward, L MoE layers, K top-k, E experts per layer, R tiers.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.errors import ConfigError
from offload_moe.experts.attach import SpannedLayers, bound_experts
from offload_moe.experts.observer import HookObserver
from offload_moe.families.cache_name import cache_in
from offload_moe.profile.columns import Columns, Forward, Mark, PackedForward, make_trace, to_columns
from offload_moe.profile.routers import Router, find_router
from offload_moe.profile.trace import Trace
from offload_moe.residency.scheduler import Scheduler

FORWARDS_PER_CHUNK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTier:
    """One tier of a recording.

    bytes_field: the field of `Counters` for the bytes loaded into this tier.
    """

    name: str
    scheduler: Scheduler
    bytes_field: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The subject of a recording. tiers: fastest first. metadata: of the trace, ready for `json.dumps`."""

    hf: nn.Module
    layers: Sequence[ExpertsModule]
    tiers: Sequence[RecordedTier]
    metadata: Mapping[str, Any]


class Recorder:
    """Filled by the hooks of `record`. One sequence at a time; `group` is a label of the next sequences."""

    def __init__(self, subject: Subject) -> None:
        self.group = ""
        self.num_dropped = 0  # forwards that were interrupted, or that did not pass through every MoE layer once
        self._subject = subject
        self._width = max(layer.num_experts for layer in subject.layers)
        self._routers: list[Router | None] = []
        self._mark = _marker(subject.tiers)
        self._current: Forward | None = None
        self._pending: list[PackedForward] = []
        self._columns: list[Columns] = []
        self._groups: list[str] = []
        self._position = -1  # position in its sequence of the token after the last recorded one
        self._ended = 0.0
        self._between_s: list[float] = []

    def trace(self) -> Trace:
        """The trace of everything recorded so far.

        Raises: ConfigError when nothing was recorded.
        """
        self._settle()
        if not self._columns:
            raise ConfigError("Nothing was recorded: no forward passed through every MoE layer. Generate something.")
        subject = self._subject
        metadata = {
            **subject.metadata,
            "num_slots": {tier.name: tier.scheduler.residency.num_slots for tier in subject.tiers},
            "groups": self._groups,
            "num_dropped_forwards": self.num_dropped,
            "between_tokens_s": sum(self._between_s),
            "num_between_tokens": len(self._between_s),
        }
        return make_trace(
            self._columns,
            num_experts=[layer.num_experts for layer in subject.layers],
            tiers=tuple(tier.name for tier in subject.tiers),
            metadata=json.dumps(metadata),
        )

    def begin(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        forward = self._current
        if forward is not None:
            forward.calls.append((layer, top_k_index, top_k_weights, self._mark()))

    def end(self) -> None:
        forward = self._current
        if forward is not None:
            forward.ends.append(self._mark())

    def ran(self, layers: SpannedLayers) -> None:
        forward = self._current
        if forward is not None:
            forward.add_span(layers, self._mark())

    def _begin_forward(self, input_ids: Tensor, start: int) -> None:
        """input_ids: [1, T]; start: number of the sequence's tokens in the cache."""
        if input_ids.shape[0] != 1:
            raise ConfigError(f"One sequence can be recorded at a time, not a batch of {input_ids.shape[0]}.")
        self.num_dropped += self._current is not None
        is_continued = start > 0 and start == self._position
        subject = self._subject
        self._current = Forward(
            input_ids=input_ids,
            start=start,
            is_new=not is_continued,
            num_tiers=len(subject.tiers),
            num_layers=len(subject.layers),
        )
        began = time.perf_counter()
        if is_continued and input_ids.shape[1] == 1:
            self._between_s.append(began - self._ended)
        self._current.began = self._mark()

    def _end_forward(self) -> None:
        forward, self._current = self._current, None
        if forward is None:
            return
        ended = self._mark()
        if not forward.is_complete():
            self.num_dropped += 1
            return
        self._position = forward.start + forward.input_ids.shape[1]
        if forward.is_new:
            self._groups.append(self.group)
        self._pending.append(forward.pack(ended, self._width))
        if len(self._pending) >= FORWARDS_PER_CHUNK:
            self._settle()
        self._ended = time.perf_counter()

    def _settle(self) -> None:
        """Convert the collected forwards to arrays."""
        if self._pending:
            self._columns.append(to_columns(self._pending, self._routers, self._width))
            self._pending = []


def _marker(tiers: Sequence[RecordedTier]) -> Callable[[], Mark]:
    """Read the clock and the running totals: useful prefetches, then stalls and bytes of every tier."""
    counters, clock = tiers[0].scheduler.counters, time.perf_counter
    if len(tiers) == 1 and tiers[0].bytes_field == "disk_bytes":
        return lambda: (clock(), counters.num_useful_prefetches, counters.stall_s, counters.disk_bytes)
    stalled, fields = [tier.scheduler.counters for tier in tiers], [tier.bytes_field for tier in tiers]
    return lambda: (
        clock(),
        counters.num_useful_prefetches,
        *(tier.stall_s for tier in stalled),
        *(getattr(counters, field) for field in fields),
    )


class TierObserver:
    """Passes the events of one tier's scheduler to the forward in progress."""

    def __init__(self, recorder: Recorder, tier: int) -> None:
        self._recorder = recorder
        self._tier = tier

    def acquired(self, layer: int, arriving: Sequence[int], missing: Sequence[int]) -> None:
        forward = self._recorder._current
        if forward is not None and (arriving or missing):
            forward.outcomes[self._tier].append((layer, arriving, missing))

    def computed_on_cpu(self, layer: int, experts: Sequence[int]) -> None:
        forward = self._recorder._current
        if forward is not None:
            forward.outcomes[self._tier].append((layer, [], experts))
            forward.on_cpu.append((layer, experts))

    def prefetched(self, layer: int, num_started: int) -> None:
        forward = self._recorder._current
        if forward is not None:
            forward.prefetches[self._tier].append((layer, num_started))


@contextmanager
def record(subject: Subject) -> Iterator[Recorder]:
    """Record every forward of the model until the context ends; the recorder keeps the result."""
    recorder = Recorder(subject)
    with ExitStack() as undo:
        for number, tier in enumerate(subject.tiers):
            tier.scheduler.observer = TierObserver(recorder, number)
            undo.callback(setattr, tier.scheduler, "observer", None)
        for ordinal, layer in enumerate(subject.layers):
            bound = bound_experts(layer.module)
            assert bound is not None
            bound.recorder = recorder
            undo.callback(setattr, bound, "recorder", None)
            router = find_router(subject.hf, layer.block_name, layer.num_experts)
            recorder._routers.append(router)
            if router is not None:
                handle = router.module.register_forward_hook(ScoreCapture(recorder, ordinal, router))
                undo.callback(handle.remove)
        for handle in _forward_hooks(recorder, subject.hf):
            undo.callback(handle.remove)
        yield recorder


class ScoreCapture(HookObserver):
    """Collects the output of a layer's router."""

    def __init__(self, recorder: Recorder, layer: int, router: Router) -> None:
        self._recorder, self._layer, self._router = recorder, layer, router
        self._place: int | None = None  # index of the scores in the router's output, if they need no reshaping

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        forward = self._recorder._current
        if forward is None:
            return
        if self._place is not None:
            forward.scores[self._layer] = out[self._place]
            return
        scores = forward.scores[self._layer] = self._router.scores(out, forward.input_ids.shape[1])
        if isinstance(out, tuple):
            self._place = next((place for place, part in enumerate(out) if part is scores), None)


def _forward_hooks(recorder: Recorder, hf: nn.Module) -> list[Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, cache = kwargs.get("input_ids", args[0] if args else None), cache_in(kwargs)
        if ids is None:
            recorder.num_dropped += 1  # called with embeddings instead of token ids
            return
        recorder._begin_forward(ids, 0 if cache is None else int(cache.get_seq_length()))

    def after(module: nn.Module, args: Any, out: Any) -> None:
        recorder._end_forward()

    return [hf.register_forward_pre_hook(before, with_kwargs=True), hf.register_forward_hook(after)]
