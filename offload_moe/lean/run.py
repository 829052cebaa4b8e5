"""A run: consecutive decoder layers whose decode step is one kernel call, as long as their experts are resident.

A token streams so many bytes of weights through the caches that whatever Python does between two kernel calls finds its
code and data in none: about half a millisecond per layer. A run is called once per token. The call returns at a layer
that lacks an expert, or whose guess for the next layers does, which is then done as usual, and goes on behind it.

While a run is under way the whole pool is leased. What it used is accounted for afterwards, layer by layer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from offload_moe import kernels
from offload_moe.hooks import have_only_onlookers, hooks_of
from offload_moe.lean.block import PlainBlock
from offload_moe.lean.cache import Room
from offload_moe.lean.step import AttentionStep
from offload_moe.moe.attach import BoundExperts, RanLayers
from offload_moe.moe.native import NativeArithmetic
from offload_moe.schedule.hierarchy import Hierarchy

Rotary = tuple[Tensor, Tensor]


class Step(Protocol):
    """A layer of the run: `LayerStep` where its block is a router and experts."""

    layer: nn.Module
    attention: AttentionStep
    plain: PlainBlock | None
    kernel: kernels.LayerKernel

    @property
    def num_keepers(self) -> int: ...

    def keep(self, residual: Tensor) -> None: ...

    def fits(self, hidden_states: Tensor, cache: Any) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Seen:
    """A row of layers, from the first of the run on, of which each was given what the one before it gave."""

    num_layers: int
    result: Tensor
    copy: Tensor
    settings: tuple[Any, ...]

    def leads_to(self, given: Tensor, settings: tuple[Any, ...]) -> bool:
        is_same = all(mine is theirs for mine, theirs in zip(self.settings, settings, strict=True))
        return is_same and given is self.result and torch.equal(given, self.copy)


class LayerRun:
    """The decode step of these layers; the first of them calls it, and the others find their work done."""

    def __init__(self, steps: Sequence[Step], hierarchy: Hierarchy) -> None:
        """steps: layers that follow each other, for which `can_run` says the same."""
        self._steps = steps
        self._arena = hierarchy.arena
        self._scheduler = hierarchy.scheduler
        self._blocks = [cast(PlainBlock, step.plain) for step in steps]
        self._bound = [block.bound for block in self._blocks]
        self._is_chain = False  # until a token has shown it
        self._seen: _Seen | None = None
        self._passed: tuple[Tensor | None, int] = (None, 0)  # what the last run gave, and how many layers know
        self._layer_hooks = hooks_of(step.layer for step in steps)
        self._expert_hooks = hooks_of(block.experts for block in self._blocks)
        route = self._blocks[0].route
        self._num_experts, self._top_k = route.num_experts, route.top_k
        self._kernel = kernels.RunKernel(
            [_run_layer(step, hierarchy.pools.num_experts) for step in steps],
            hidden=route.hidden_size,
            num_experts=route.num_experts,
            top_k=route.top_k,
        )

    def begins_with(self, step: Step) -> bool:
        return step is self._steps[0]

    def has_passed(self, step: Step, hidden_states: Tensor) -> bool:
        """Whether this is the run's result on its way through the layers that made it."""
        result, num_told = self._passed
        if hidden_states is not result or step is not self._steps[num_told]:
            return False
        self._passed = (result, num_told + 1) if num_told + 1 < len(self._steps) else (None, 0)
        return True

    def watch(self, step: Step, given: Tensor, result: Tensor, settings: tuple[Any, ...]) -> None:
        """Learn from a token done layer by layer whether the model hands on what each layer gives, as it is.

        settings: what else the layers are given, which must be the same objects for all of them.
        """
        if self._is_chain:
            return
        seen = self._seen
        if step is self._steps[0]:
            num_layers = 1
        elif seen is not None and step is self._steps[seen.num_layers] and seen.leads_to(given, settings):
            num_layers = seen.num_layers + 1
        else:
            num_layers = 0
        self._is_chain = num_layers == len(self._steps)
        is_on = 0 < num_layers < len(self._steps)
        self._seen = _Seen(num_layers, result, result.clone(), settings) if is_on else None

    def fits(self, hidden_states: Tensor, cache: Any) -> bool:
        """Whether all layers can be done at once: nobody looks in between, or waits for a module.

        Lookahead goes along where the run may ask the routers for it.
        """
        recorder, lookahead = self._bound[0].recorder, self._bound[0].lookahead
        return (
            self._is_chain
            and all(bound.lookahead is lookahead and bound.recorder is recorder for bound in self._bound)
            and not any(self._expert_hooks)
            and have_only_onlookers(self._layer_hooks)
            and all(step.num_keepers == (lookahead is not None) for step in self._steps)
            and all(step.fits(hidden_states, cache) and step.attention.can_extend(cache) for step in self._steps)
            and (lookahead is None or not self._ranks() or lookahead.can_be_run(len(self._steps)))
        )

    def __call__(self, hidden_states: Tensor, rotary: Rotary, cache: Any) -> Tensor:
        """``[1, 1, H]`` -> ``[1, 1, H]``."""
        rooms = [cast(Room, step.attention.extend(cache)) for step in self._steps]
        x = hidden_states.clone(memory_format=torch.contiguous_format)
        shape = {"num_experts": self._num_experts, "top_k": self._top_k}
        token = kernels.RunToken(x, rooms, rotary, **shape, ranks=self._ranks())
        at, num_layers = 0, len(self._steps)
        while at < num_layers:
            at = self._advance(token, at)
            if at < num_layers:
                self._acquire(token, at)
                at += 1
        self._passed = (x, 1) if num_layers > 1 else (None, 0)
        return x

    def _advance(self, token: kernels.RunToken, first: int) -> int:
        """Through the layers from `first` on where nothing is missing. Returns how many of all are done."""
        began, chosen, num_useful = time.perf_counter(), [], [0]
        slots = self._scheduler.hold_pool()
        try:
            num_done = self._kernel.step(token, slots, self._arena.addresses, first)
            chosen = token.ids[first:num_done].tolist()
        finally:
            num_useful = self._scheduler.let_go_pool(self._bound[first].layer, chosen)
        lookahead = self._bound[0].lookahead
        if lookahead is not None:
            for at, experts in enumerate(chosen, first):
                lookahead.passed(self._bound[at].layer, experts, self._guesses(token, at))
        self._tell(token, first, began, num_useful)
        return num_done

    def _acquire(self, token: kernels.RunToken, at: int) -> None:
        """The experts of a layer where something is missing."""
        step, bound = self._steps[at], self._bound[at]
        for onlooker in step.layer._forward_pre_hooks.values():
            onlooker(step.layer, ())
        self._tell_router(token, at)
        if bound.lookahead is not None:
            step.keep(token.residual)
            bound.lookahead.foretell(bound.layer, self._guesses(token, at))
        out = self._blocks[at].compute(token.normed[0], token.routed[at])
        torch.add(token.residual[0], out, out=token.x[0])

    def _tell(self, token: kernels.RunToken, first: int, began: float, num_useful: Sequence[int]) -> None:
        """The recorder, or else the routers' onlookers, are told what happened meanwhile."""
        recorder, num_layers = self._bound[0].recorder, len(num_useful) - 1
        if recorder is None:
            for at in range(first, first + num_layers):
                self._tell_router(token, at)
        elif num_layers:
            rows = slice(first, first + num_layers)
            recorder.ran(
                RanLayers(
                    first_layer=self._bound[first].layer,
                    logits=token.logits[rows],
                    weights=token.weights[rows],
                    ids=token.ids[rows],
                    times=token.times[rows] + began,
                    num_useful=num_useful,
                )
            )

    def _tell_router(self, token: kernels.RunToken, at: int) -> None:
        router = self._blocks[at].router
        for onlooker in router._forward_hooks.values():
            onlooker(router, (), token.routed[at])

    def _ranks(self) -> list[int]:
        """How many guesses are wanted of each layer, per layer behind it."""
        lookahead = self._bound[0].lookahead
        return [] if lookahead is None else lookahead.num_ranks(self._bound[0].layer, self._top_k)

    def _guesses(self, token: kernels.RunToken, at: int) -> list[list[int]]:
        guesses: list[list[int]] = token.guesses[at].tolist()
        return guesses[: len(self._steps) - 1 - at]


def can_run(hierarchy: Hierarchy, step: Any) -> tuple[int, int] | None:
    """Experts and top-k of a `Step` whose experts the native kernels compute out of the RAM arena; None for others.

    Layers of one run have the same.
    """
    plain: PlainBlock | None = getattr(step, "plain", None)
    if plain is None or hierarchy.num_slots("vram") or plain.route.top_k > kernels.MAX_TOP_K:
        return None
    bound, route = plain.bound, plain.route
    is_native = type(bound) is BoundExperts and isinstance(bound.arithmetic, NativeArithmetic)
    return (route.num_experts, route.top_k) if is_native else None


def _run_layer(step: Step, num_experts: int) -> kernels.RunLayer:
    block = cast(PlainBlock, step.plain)
    arithmetic = block.bound.arithmetic
    assert isinstance(arithmetic, NativeArithmetic)
    return kernels.RunLayer(
        step=step.kernel,
        experts=arithmetic.kernel,
        shared=block.shared,
        first_key=block.bound.layer * num_experts,
        weight_scale=arithmetic.pair_scale,
        mode=arithmetic.mode,
    )
