"""A run: consecutive decoder layers whose decode step is one kernel call, as long as their experts are resident.

A token streams so many bytes of weights through the caches that whatever Python does between two kernel calls finds its
code and data in none: about half a millisecond per layer. A run is called once per token. The call returns at a layer
that lacks an expert, which is then acquired as usual, and goes on behind it.

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
from offload_moe.lean.router import Routed
from offload_moe.lean.step import AttentionStep
from offload_moe.moe.attach import BoundExperts
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
    def is_kept(self) -> bool: ...

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
        """steps: `can_run` of each, layers that follow each other, with routers of one shape. Raises: ConfigError."""
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
        """Whether all layers can be done at once: nobody looks in between, guesses ahead, or waits for a module."""
        recorder = self._bound[0].recorder
        return (
            self._is_chain
            and all(bound.lookahead is None and bound.recorder is recorder for bound in self._bound)
            and not any(self._expert_hooks)
            and have_only_onlookers(self._layer_hooks)
            and not any(step.is_kept for step in self._steps)
            and all(step.fits(hidden_states, cache) and step.attention.can_extend(cache) for step in self._steps)
        )

    def __call__(self, hidden_states: Tensor, rotary: Rotary, cache: Any) -> Tensor:
        """``[1, 1, H]`` -> ``[1, 1, H]``."""
        rooms = [cast(Room, step.attention.extend(cache)) for step in self._steps]
        x = hidden_states.clone(memory_format=torch.contiguous_format)
        token = kernels.RunToken(x, rooms, rotary, num_experts=self._num_experts, top_k=self._top_k)
        num_done, num_layers = 0, len(self._steps)
        while (num_done := self._advance(token, num_done)) < num_layers:
            self._acquire(token, num_done)
            num_done += 1
        self._passed = (x, 1) if num_layers > 1 else (None, 0)
        return x

    def _advance(self, token: kernels.RunToken, first: int) -> int:
        """Through the layers from `first` on whose experts are resident. Returns how many of all are done."""
        began, num_done = time.perf_counter(), first
        slots = self._scheduler.hold_pool()
        try:
            num_done = self._kernel.step(token, slots, self._arena.addresses, first)
        finally:
            self._scheduler.let_go_pool(self._bound[0].layer + first, token.ids[first:num_done].tolist())
        self._tell(token, first, num_done, began)
        return num_done

    def _acquire(self, token: kernels.RunToken, at: int) -> None:
        """The experts of a layer that are not all resident."""
        step = self._steps[at]
        for onlooker in step.layer._forward_pre_hooks.values():
            onlooker(step.layer, ())
        self._tell_router(token, at)
        out = self._blocks[at].compute(token.normed[0], self._routed(token, at))
        torch.add(token.residual[0], out, out=token.x[0])

    def _tell(self, token: kernels.RunToken, first: int, end: int, began: float) -> None:
        """Routers' onlookers and the recorder are told what happened meanwhile."""
        recorder = self._bound[0].recorder
        times = token.times.tolist() if recorder is not None else []
        for at in range(first, end):
            self._tell_router(token, at)
            if recorder is not None:
                (begin, ended), (_, weights, ids) = times[at], self._routed(token, at)
                recorder.ran(self._bound[at].layer, ids, weights, began + begin, began + ended)

    def _tell_router(self, token: kernels.RunToken, at: int) -> None:
        router = self._blocks[at].router
        for onlooker in router._forward_hooks.values():
            onlooker(router, (), self._routed(token, at))

    @staticmethod
    def _routed(token: kernels.RunToken, at: int) -> Routed:
        row = slice(at, at + 1)
        return token.logits[row], token.weights[row], token.ids[row]


def can_run(hierarchy: Hierarchy, step: Any) -> bool:
    """Whether this is a `Step` whose experts are computed by the native kernels out of the RAM arena."""
    plain: PlainBlock | None = getattr(step, "plain", None)
    if plain is None or hierarchy.num_slots("vram"):
        return False
    bound = plain.bound
    return type(bound) is BoundExperts and isinstance(bound.arithmetic, NativeArithmetic)


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
