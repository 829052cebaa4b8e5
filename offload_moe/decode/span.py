"""A span: consecutive decoder layers through which a native thread takes some rows, from the first to the last.

A row is the next token of a sequence; nearly always there is one. Experts that several rows chose are acquired and
counted once, as those of a chunk of a prompt are. Lookahead and the recording of layers take one token at a time:
several rows are not looked ahead for, and where a recorder is they go layer by layer.

A token streams so many bytes of weights through the caches that Python's code and data between two kernel calls are in
none of them: about half a millisecond per layer where everything is resident, two where experts are missing. So the
thread does without Python: it leases what is resident and fetches what is not into slots that are reserved for it (see
`residency/reserved.py`). Python chooses what is evicted for these slots, reserves more when they run out, and brings
experts that could not be fetched. Counters and policy are updated afterwards, layer by layer, in their order.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offload_moe.decode.block import PlainBlock
from offload_moe.decode.layer import NativeLayer, RowsStep
from offload_moe.experts.attach import BoundExperts, SpannedLayers
from offload_moe.experts.native import NativeArithmetic
from offload_moe.memory.waiting import STEP_S
from offload_moe.native import kernels
from offload_moe.residency.accounts import Choice, Mark, mark, note_passed, sort_found
from offload_moe.residency.hierarchy import Hierarchy
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.lease import Lease
from offload_moe.residency.reserved import SLOTS_PER_CHOICE
from offload_moe.residency.scheduler import Scheduler


@dataclass(slots=True)
class _Account:
    """When a token pass began, and, for a recorder, the `mark` before the first layer and after each."""

    began: float
    marks: list[Mark] | None


class _StallWatchdog:
    """How long a token pass has made no progress. Time in which the process is stopped does not count."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._clock = scheduler.clock
        self._progress: tuple[int, ...] = ()
        self._waited_s, self._looked_at = 0.0, self._clock()

    def since(self, progress: tuple[int, ...]) -> float:
        """Seconds for which this has been the progress, as far as they count against a limit."""
        before, self._looked_at = self._looked_at, self._clock()
        is_new, self._progress = progress != self._progress, progress
        self._waited_s = 0.0 if is_new else self._waited_s + min(self._looked_at - before, STEP_S)
        return self._waited_s


class LayerSpan:
    """Consecutive layers of one token pass."""

    def __init__(self, layers: Sequence[NativeLayer], hierarchy: Hierarchy) -> None:
        """layers: that follow each other, for which `span_kind` is the same, and dense ones between and beside them.

        Those that have experts are counted by themselves.
        """
        self.layers = layers
        self._attentions = [layer.attention for layer in layers]
        self._routed = [layer for layer in layers if layer.plain is not None]
        assert hierarchy.slot_table is not None
        self._slot_table = hierarchy.slot_table
        self._reserved = hierarchy.reserved()
        self._scheduler = hierarchy.scheduler
        self._hierarchy = hierarchy
        self._blocks = [cast(PlainBlock, layer.plain) for layer in self._routed]
        self._bound = [block.bound for block in self._blocks]
        self._router_hooks = [block.router._forward_hooks for block in self._blocks]
        self._captures = [layer.captures for layer in self._routed]
        self._spare: dict[tuple[int, ...], kernels.SpanRows] = {}  # memory of the last pass, by its rows and ranks
        route = self._blocks[0].route
        self._num_experts, self._top_k = route.num_experts, route.top_k
        self._kernel = kernels.SpanKernel(
            [_span_layer(layer, hierarchy.pools.keys) for layer in layers],
            hidden=layers[0].hidden_size,
            num_experts=route.num_experts,
            top_k=route.top_k,
        )

    def fits(self, cache: Any, num_tokens: int = 1) -> bool:
        """Whether the cache can take the next tokens of all layers in place."""
        return all(layer.fits(cache, num_tokens) for layer in self.layers)

    def __call__(self, x: Tensor, step: RowsStep) -> Tensor:
        """``[1, T, H]``, overwritten -> ``[1, T, H]``. A prompt goes layer by layer.

        Raises: TransferError, ModelClosed.
        """
        if step.are_many or not self._is_native_throughout(step.num_rows):
            for layer in self.layers:
                x = layer(x, step)
            return x
        with self._hierarchy.lifecycle:
            return self.pass_natively(x, step)

    def _is_native_throughout(self, num_rows: int) -> bool:
        """Whether a pass has slots enough, and no layer has other observers than those it serves."""
        recorder, lookahead = self._bound[0].recorder, self._bound[0].lookahead
        most_chosen = min(num_rows * self._top_k, self._num_experts)
        return (
            self._scheduler.residency.num_slots >= SLOTS_PER_CHOICE * most_chosen
            and (recorder is None or num_rows == 1)
            and all(bound.lookahead is lookahead and bound.recorder is recorder for bound in self._bound)
            and all(len(captures) == (lookahead is not None) for captures in self._captures)
            and (lookahead is None or not self._ranks(num_rows) or lookahead.can_be_spanned(len(self._routed)))
        )

    def pass_natively(self, x: Tensor, step: RowsStep) -> Tensor:
        rooms = step.places(self._attentions)
        rotary, ranks = step.rotary(self.layers[0].rotary), self._ranks(step.num_rows)
        recorder = self._bound[0].recorder
        is_observed = recorder is not None or any(self._router_hooks)
        rows = None if is_observed else self._spare.pop((step.num_rows, *ranks), None)
        if rows is None:
            shape = {"num_experts": self._num_experts, "top_k": self._top_k, "num_layers": len(self._routed)}
            rows = kernels.SpanRows(x, rooms, rotary, **shape, ranks=ranks)
        else:
            rows.begin(x, rooms, rotary)
        account = _Account(time.perf_counter(), None if recorder is None else [mark(self._scheduler)])
        self._token_pass(rows, account)
        if recorder is not None:
            recorder.ran(self._ran(rows, account))
        if not is_observed:
            rows.end()
            self._spare = {(step.num_rows, *ranks): rows}
        return x

    def _token_pass(self, rows: kernels.SpanRows, account: "_Account") -> None:
        """Through all layers, and account for them in their order."""
        if self._hierarchy.hold_every_expert():
            try:
                self._kernel.pass_through(rows, self._slot_table)
            finally:
                self._hierarchy.release_every_expert()
            self._note_passed(rows, 0, len(self._routed), account)
        else:
            self._follow_pass(rows, account)
            self._scheduler.counters.stall_s += rows.stalls.sum().item()

    def _follow_pass(self, rows: kernels.SpanRows, account: "_Account") -> None:
        """On a thread of its own, with slots to fill, which are reclaimed once it has ended and leases nothing."""
        reads = self._hierarchy.pass_reads
        try:
            with self._kernel.start(rows, self._slot_table, reads) as token_pass:
                self._reserve()
                self._serve(token_pass, rows, account)
        finally:
            if self._reserved is not None:
                self._reserved.reclaim()

    def _serve(self, token_pass: kernels.TokenPass, rows: kernels.SpanRows, account: "_Account") -> None:
        """Give the token pass what it needs until it ends."""
        num_layers, num_noted, watchdog = len(self._routed), 0, _StallWatchdog(self._scheduler)
        with ExitStack() as held:
            while num_noted < num_layers:
                need = token_pass.next(num_noted)
                if need is None:
                    self._wait_on(rows, num_noted, watchdog)
                    continue
                at, needs = need
                held.close()
                self._note_passed(rows, num_noted, at, account)
                num_noted = at
                if needs & kernels.NEEDS_EXPERTS:
                    held.enter_context(self._acquire(rows, at)).bring()
                    if account.marks is not None:
                        account.marks.append(mark(self._scheduler))
                    num_noted += 1
                if needs & kernels.NEEDS_SLOTS:
                    self._reserve()
            while token_pass.next(num_layers) is None:
                self._wait_on(rows, num_layers - 1, watchdog)

    def _reserve(self) -> None:
        if self._reserved is not None:
            self._reserved.reserve(may_evict=not self._hierarchy.holds_every_expert)

    def _wait_on(self, rows: kernels.SpanRows, at: int, watchdog: "_StallWatchdog") -> None:
        """Nothing is needed by layers from this one on yet; observers may stop the token here.

        Raises: TransferError, ModelClosed.
        """
        self._hierarchy.lifecycle.check_waiting()
        self._routed[at].note_begin()
        with self._scheduler.changed:
            self._scheduler.drain_completions()
        num_begun = int((rows.times[:, 0] > 0).sum())
        waited_s = watchdog.since((num_begun, self._scheduler.counters.disk_bytes))
        if waited_s > self._scheduler.stall_limit_s:
            raise self._scheduler.late(f"Experts of layer {self._bound[max(0, num_begun - 1)].layer}")

    def _note_passed(self, rows: kernels.SpanRows, first: int, end: int, account: "_Account") -> None:
        """Account for layers for which Python brought no expert."""
        if first == end:
            return
        choices = choices_of(rows, first, end)
        note_passed(self._scheduler, self._bound[first].layer, choices, rows.num_rows, account.marks)
        if self._bound[0].lookahead is None and not any(self._router_hooks):
            return
        for at, choice in enumerate(choices, first):
            self._note_guesses(rows, at, choice.experts)
            self._note_routed(rows, at)

    def _acquire(self, rows: kernels.SpanRows, at: int) -> Lease:
        """The experts of a layer that could not fetch them all."""
        bound = self._bound[at]
        self._routed[at].note_begin()
        (choice,) = choices_of(rows, at, at + 1)
        experts = sorted(choice.experts)
        found = sort_found(choice.experts, choice.found)
        lease = self._scheduler.acquire(bound.layer, experts, choice.shares, rows.num_rows, found=found)
        self._note_guesses(rows, at, experts)
        self._note_routed(rows, at)
        return lease

    def _note_guesses(self, rows: kernels.SpanRows, at: int, experts: Sequence[int]) -> None:
        lookahead = self._bound[at].lookahead
        if lookahead is not None and rows.num_rows > 1:
            lookahead.pause()
        elif lookahead is not None:
            num_ahead = len(self._routed) - 1 - at
            guesses, found = rows.guesses[at, :num_ahead].tolist(), rows.guesses_found[at, :num_ahead].tolist()
            lookahead.passed(self._bound[at].layer, experts, guesses, found)

    def _ran(self, rows: kernels.SpanRows, account: "_Account") -> SpannedLayers:
        assert account.marks is not None
        num_useful, disk_bytes = zip(*account.marks, strict=True)
        return SpannedLayers(
            first_layer=self._bound[0].layer,
            logits=rows.logits[:, 0],
            weights=rows.weights[:, 0],
            ids=rows.ids[:, 0],
            times=rows.times + account.began,
            stalls=rows.stalls,
            num_useful=num_useful,
            disk_bytes=disk_bytes,
        )

    def _note_routed(self, rows: kernels.SpanRows, at: int) -> None:
        if self._bound[at].recorder is not None:
            return  # it is given all layers at once
        router = self._blocks[at].router
        for observer in router._forward_hooks.values():
            observer(router, (), rows.routed[at])

    def _ranks(self, num_rows: int) -> list[int]:
        """How many guesses of each layer count, per layer behind it."""
        lookahead = self._bound[0].lookahead
        return [] if lookahead is None or num_rows > 1 else lookahead.num_ranks(self._bound[0].layer, self._top_k)


def choices_of(rows: kernels.SpanRows, first: int, end: int) -> list[Choice]:
    """The experts of some layers: in the router's order for one row, else ascending."""
    if rows.num_rows == 1:
        return [Choice(ids, states) for ids, states in map(rows.chosen, range(first, end))]
    return _distinct(rows.ids[first:end].numpy(), rows.found[first:end].numpy(), rows.logits.shape[2])


def _distinct(ids: NDArray[np.int64], states: NDArray[np.uint8], num_experts: int) -> list[Choice]:
    """Of some layers: what their rows ``[L, T, K]`` chose, and how it was found."""
    num_layers, num_rows, _ = ids.shape
    layers = np.arange(num_layers)[:, None, None]
    counts = np.bincount((layers * num_experts + ids).ravel(), minlength=num_layers * num_experts)
    counts = counts.reshape(num_layers, num_experts)
    how = np.zeros(counts.shape, np.uint8)
    how[layers, ids] = states
    chosen = np.nonzero(counts)
    ends = np.count_nonzero(counts, axis=1).cumsum().tolist()
    experts, found = chosen[1].tolist(), how[chosen].tolist()
    shares = (counts[chosen] / num_rows).tolist()
    return [
        Choice(experts[begin:end], found[begin:end], shares[begin:end])
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def span_kind(hierarchy: Hierarchy, layer: NativeLayer) -> tuple[int, int] | None:
    """Experts and top-k of a layer whose experts the native kernels compute out of the RAM arena; None for others.

    Layers of one span have the same.
    """
    plain = layer.plain
    if plain is None or hierarchy.slot_table is None or plain.route.top_k > kernels.MAX_TOP_K:
        return None
    bound, route = plain.bound, plain.route
    is_native = type(bound) is BoundExperts and isinstance(bound.arithmetic, NativeArithmetic)
    return (route.num_experts, route.top_k) if is_native else None


def _span_layer(layer: NativeLayer, keys: ExpertKeys) -> kernels.SpanLayer:
    block = layer.plain
    if block is None:
        return kernels.SpanLayer(step=layer.kernel, dense=layer.dense)
    arithmetic = block.bound.arithmetic
    assert isinstance(arithmetic, NativeArithmetic)
    return kernels.SpanLayer(
        step=layer.kernel,
        experts=arithmetic.kernel,
        shared=block.shared,
        first_key=keys.first(block.bound.layer),
        weight_scale=arithmetic.pair_scale,
        scales_inputs=block.scales_inputs,
    )
