"""A span: consecutive decoder layers through which a native thread takes a token, from the first to the last.

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

import torch
from torch import Tensor

from offload_moe.decode.block import PlainBlock
from offload_moe.decode.layer import NativeLayer, TokenStep
from offload_moe.experts.attach import BoundExperts, SpannedLayers
from offload_moe.experts.native import NativeArithmetic
from offload_moe.memory.waiting import STEP_S
from offload_moe.native import kernels
from offload_moe.residency.accounts import Mark, mark, note_passed, sort_found
from offload_moe.residency.hierarchy import Hierarchy
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.lease import Lease
from offload_moe.residency.reserved import SLOTS_PER_CHOICE
from offload_moe.residency.scheduler import Scheduler


@dataclass(slots=True)
class _Account:
    """When a token pass began, and the `mark` before the first layer and after each."""

    began: float
    marks: list[Mark]


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
        """layers: that follow each other, for which `span_kind` is the same."""
        self.layers = layers
        assert hierarchy.slot_table is not None
        self._slot_table = hierarchy.slot_table
        self._reserved = hierarchy.reserved()
        self._scheduler = hierarchy.scheduler
        self._hierarchy = hierarchy
        self._blocks = [cast(PlainBlock, layer.plain) for layer in layers]
        self._bound = [block.bound for block in self._blocks]
        route = self._blocks[0].route
        self._num_experts, self._top_k = route.num_experts, route.top_k
        self._kernel = kernels.SpanKernel(
            [_span_layer(layer, hierarchy.pools.keys) for layer in layers],
            hidden=layers[0].hidden_size,
            num_experts=route.num_experts,
            top_k=route.top_k,
        )

    def fits(self, cache: Any) -> bool:
        """Whether the cache can take one more token of all layers in place."""
        return all(layer.fits(cache) for layer in self.layers)

    def __call__(self, x: Tensor, step: TokenStep) -> Tensor:
        """``[1, 1, H]`` -> ``[1, 1, H]``. Raises: TransferError, ModelClosed."""
        if not self._is_native_throughout():
            for layer in self.layers:
                x = layer(x, step)
            return x
        with self._hierarchy.lifecycle:
            return self.pass_natively(x, step)

    def _is_native_throughout(self) -> bool:
        """Whether a pass has slots enough, and no layer has other observers than those it serves."""
        recorder, lookahead = self._bound[0].recorder, self._bound[0].lookahead
        return (
            self._scheduler.residency.num_slots >= SLOTS_PER_CHOICE * self._top_k
            and all(bound.lookahead is lookahead and bound.recorder is recorder for bound in self._bound)
            and all(layer.num_captures == (lookahead is not None) for layer in self.layers)
            and (lookahead is None or not self._ranks() or lookahead.can_be_spanned(len(self.layers)))
        )

    def pass_natively(self, x: Tensor, step: TokenStep) -> Tensor:
        rooms = [[layer.attention.extend(step.cache)] for layer in self.layers]
        x = x.clone(memory_format=torch.contiguous_format)
        shape = {"num_experts": self._num_experts, "top_k": self._top_k}
        rotary = self.layers[0].rotary.prepare(step.embeddings)
        token = kernels.SpanRows(x, rooms, rotary, **shape, ranks=self._ranks())
        self._token_pass(token)
        return x

    def _token_pass(self, token: kernels.SpanRows) -> None:
        """Through all layers, and account for them in their order."""
        account = _Account(began=time.perf_counter(), marks=[mark(self._scheduler)])
        with self._hierarchy.every_expert() as are_here:
            if are_here:
                self._kernel.pass_through(token, self._slot_table)
        if are_here:
            self._note_passed(token, 0, len(self.layers), account)
        else:
            self._follow_pass(token, account)
        self._scheduler.counters.stall_s += token.stalls.sum().item()
        recorder = self._bound[0].recorder
        if recorder is not None:
            recorder.ran(self._ran(token, account))

    def _follow_pass(self, token: kernels.SpanRows, account: "_Account") -> None:
        """On a thread of its own, with slots to fill, which are reclaimed once it has ended and leases nothing."""
        reads = self._hierarchy.pass_reads
        try:
            with self._kernel.start(token, self._slot_table, reads) as token_pass:
                self._reserve()
                self._serve(token_pass, token, account)
        finally:
            if self._reserved is not None:
                self._reserved.reclaim()

    def _serve(self, token_pass: kernels.TokenPass, token: kernels.SpanRows, account: "_Account") -> None:
        """Give the token pass what it needs until it ends."""
        num_layers, num_noted, watchdog = len(self.layers), 0, _StallWatchdog(self._scheduler)
        with ExitStack() as held:
            while num_noted < num_layers:
                need = token_pass.next(num_noted)
                if need is None:
                    self._wait_on(token, num_noted, watchdog)
                    continue
                at, needs = need
                held.close()
                self._note_passed(token, num_noted, at, account)
                num_noted = at
                if needs & kernels.NEEDS_EXPERTS:
                    held.enter_context(self._acquire(token, at)).bring()
                    account.marks.append(mark(self._scheduler))
                    num_noted += 1
                if needs & kernels.NEEDS_SLOTS:
                    self._reserve()
            while token_pass.next(num_layers) is None:
                self._wait_on(token, num_layers - 1, watchdog)

    def _reserve(self) -> None:
        if self._reserved is not None:
            self._reserved.reserve(may_evict=not self._hierarchy.holds_every_expert)

    def _wait_on(self, token: kernels.SpanRows, at: int, watchdog: "_StallWatchdog") -> None:
        """Nothing is needed by layers from this one on yet; observers may stop the token here.

        Raises: TransferError, ModelClosed.
        """
        self._hierarchy.lifecycle.check_waiting()
        self.layers[at].note_begin()
        with self._scheduler.changed:
            self._scheduler.drain_completions()
        num_begun = int((token.times[:, 0] > 0).sum())
        waited_s = watchdog.since((num_begun, self._scheduler.counters.disk_bytes))
        if waited_s > self._scheduler.stall_limit_s:
            raise self._scheduler.late(f"Experts of layer {self._bound[max(0, num_begun - 1)].layer}")

    def _note_passed(self, token: kernels.SpanRows, first: int, end: int, account: "_Account") -> None:
        """Account for layers for which Python brought no expert."""
        if first == end:
            return
        experts, found = token.ids[first:end, 0].tolist(), token.found[first:end, 0].tolist()
        account.marks += note_passed(self._scheduler, self._bound[first].layer, experts, found)
        for at, chosen in enumerate(experts, first):
            self._note_guesses(token, at, chosen)
            self._note_routed(token, at)

    def _acquire(self, token: kernels.SpanRows, at: int) -> Lease:
        """The experts of a layer that could not fetch them all."""
        bound = self._bound[at]
        self.layers[at].note_begin()
        chosen = token.ids[at, 0].tolist()
        experts = sorted(chosen)
        found = sort_found(chosen, token.found[at, 0].tolist())
        lease = self._scheduler.acquire(bound.layer, experts, found=found)
        self._note_guesses(token, at, experts)
        self._note_routed(token, at)
        return lease

    def _note_guesses(self, token: kernels.SpanRows, at: int, experts: Sequence[int]) -> None:
        lookahead = self._bound[at].lookahead
        if lookahead is not None:
            num_ahead = len(self.layers) - 1 - at
            guesses, found = token.guesses[at, :num_ahead].tolist(), token.guesses_found[at, :num_ahead].tolist()
            lookahead.passed(self._bound[at].layer, experts, guesses, found)

    def _ran(self, token: kernels.SpanRows, account: "_Account") -> SpannedLayers:
        num_useful, disk_bytes = zip(*account.marks, strict=True)
        return SpannedLayers(
            first_layer=self._bound[0].layer,
            logits=token.logits[:, 0],
            weights=token.weights[:, 0],
            ids=token.ids[:, 0],
            times=token.times + account.began,
            stalls=token.stalls,
            num_useful=num_useful,
            disk_bytes=disk_bytes,
        )

    def _note_routed(self, token: kernels.SpanRows, at: int) -> None:
        if self._bound[at].recorder is not None:
            return  # it is given all layers at once
        router = self._blocks[at].router
        for observer in router._forward_hooks.values():
            observer(router, (), token.routed[at])

    def _ranks(self) -> list[int]:
        """How many guesses of each layer count, per layer behind it."""
        lookahead = self._bound[0].lookahead
        return [] if lookahead is None else lookahead.num_ranks(self._bound[0].layer, self._top_k)


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
    block = cast(PlainBlock, layer.plain)
    arithmetic = block.bound.arithmetic
    assert isinstance(arithmetic, NativeArithmetic)
    return kernels.SpanLayer(
        step=layer.kernel,
        experts=arithmetic.kernel,
        shared=block.shared,
        first_key=keys.first(block.bound.layer),
        weight_scale=arithmetic.pair_scale,
    )
