"""Binding the experts of a transformers model to a scheduler.

The forward of each experts module is replaced, and nothing else of it: by its `BoundExperts`, which have the arguments
and the result of classes in transformers' experts registry, or by the forward of an adapter for other classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.experts.arithmetic import Arithmetic
from offload_moe.experts.lookahead import Lookahead
from offload_moe.experts.native import NativeArithmetic
from offload_moe.experts.routing import group_by_expert
from offload_moe.residency.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class SpannedLayers:
    """The layers of one native span: one token through n of them.

    logits ``[n, E]``, weights and ids ``[n, K]``: the routers' outputs. times ``[n, 2]``: `time.perf_counter` at the
    begin and at the end of a layer's experts. stalls ``[n]``: seconds between them that the layer waited.
    num_useful, disk_bytes ``[n + 1]``: useful prefetches and bytes read, counted before and after each.
    """

    first_layer: int
    logits: Tensor
    weights: Tensor
    ids: Tensor
    times: Tensor
    stalls: Tensor
    num_useful: Sequence[int]
    disk_bytes: Sequence[int]


class LayerRecorder(Protocol):
    """Receives the begin and the end of each layer's experts, with the routed ids and weights ``[T, K]``."""

    def begin(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor) -> None: ...

    def end(self) -> None: ...

    def ran(self, layers: SpannedLayers) -> None:
        """Receives all layers of a span at once, in place of `begin`, `end` and the routers' own hooks."""


class BoundExperts:
    """The routed experts of one MoE layer: hidden ``[T, H]``, ids and weights ``[T, K]`` -> ``[T, H]``.

    Raises: ModelClosed, TransferError.
    """

    def __init__(
        self,
        layer: int,
        num_experts: int,
        scheduler: Scheduler,
        record_of: Callable[[int], Tensor],
        arithmetic: Arithmetic,
        lookahead: Lookahead | None = None,
    ) -> None:
        self.layer = layer
        self._num_experts = num_experts
        self.scheduler = scheduler
        self._record_of = record_of
        self.arithmetic = arithmetic
        self.lookahead = lookahead
        self.recorder: LayerRecorder | None = None

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        with self.scheduler.lifecycle:
            recorder = self.recorder
            if recorder is None:
                return self._compute(hidden, top_k_index, top_k_weights)
            recorder.begin(self.layer, top_k_index, top_k_weights)
            result = self._compute(hidden, top_k_index, top_k_weights)
            self._settle()
            recorder.end()
            return result

    def _compute(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if len(hidden) == 1 and isinstance(self.arithmetic, NativeArithmetic):
            result = self._one_token(self.arithmetic, hidden, top_k_index, top_k_weights)
            if result is not None:
                return result
        self._settle()
        routing = group_by_expert(top_k_index, self._num_experts, self._route_ahead(hidden, top_k_index))
        num_tokens = len(hidden)
        with self.scheduler.acquire(self.layer, routing.experts, routing.shares(num_tokens), num_tokens) as lease:
            self._look_ahead(hidden, routing.experts, top_k_index, routing.ahead)
            return self.arithmetic.forward(hidden, top_k_weights, routing, lease, self._record_of)

    def _one_token(
        self, arithmetic: NativeArithmetic, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor | None:
        """A decode step; None where only the general path applies."""
        ids: list[int] = top_k_index.tolist()[0]
        weight_of: dict[int, float] = dict(zip(ids, arithmetic.scaled(top_k_weights).tolist()[0], strict=True))
        experts = sorted(weight_of)
        if len(experts) < len(ids) or experts[-1] >= self._num_experts:
            return None
        weights = [weight_of[expert] for expert in experts]
        step = arithmetic.new_step(hidden, len(experts))
        slots = self.scheduler.hold(self.layer, experts)
        if slots is None:
            with self.scheduler.acquire(self.layer, experts) as lease:
                self._route_and_look_ahead(hidden, experts, top_k_index)
                return arithmetic.one_token_in_waves(step, experts, weights, lease, self._record_of)
        try:
            self._route_and_look_ahead(hidden, experts, top_k_index)
            return arithmetic.one_token(step, weights, [self._record_of(slot) for slot in slots])
        finally:
            self.scheduler.release_held(slots)

    def _settle(self) -> None:
        """Wait for earlier demands and count them."""
        self.scheduler.settle()

    def _route_ahead(self, hidden: Tensor, top_k_index: Tensor) -> list[Tensor]:
        """Run routers of later layers; on a device they are issued before the host waits for this layer's own ids."""
        return [] if self.lookahead is None else self.lookahead.route_ahead(self.layer, hidden, top_k_index.shape[-1])

    def _look_ahead(
        self, hidden: Tensor, experts: Sequence[int], top_k_index: Tensor, ahead: Sequence[list[int]]
    ) -> None:
        if self.lookahead is not None:
            self.lookahead.after_acquire(self.layer, len(hidden), experts, top_k_index.shape[-1], ahead)

    def _route_and_look_ahead(self, hidden: Tensor, experts: Sequence[int], top_k_index: Tensor) -> None:
        """On the host, after this layer's misses are issued: routing ahead takes time there."""
        if self.lookahead is not None:
            ahead = [ids.tolist()[0] for ids in self._route_ahead(hidden, top_k_index)]
            self._look_ahead(hidden, experts, top_k_index, ahead)


@dataclass(frozen=True, slots=True)
class AdaptedForward:
    """The forward of an adapter, which passes ids and weights to `bound`."""

    bound: BoundExperts
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def bound_experts(module: nn.Module) -> BoundExperts | None:
    """The experts that `attach` bound to a module; None where it has none."""
    forward = vars(module).get("forward")
    if isinstance(forward, AdaptedForward):
        return forward.bound
    return forward if isinstance(forward, BoundExperts) else None


def detach_parameters(layers: Sequence[ExpertsModule]) -> None:
    """Delete the expert parameters: a wrong dispatch is then an AttributeError instead of silent garbage."""
    for layer in layers:
        for name in layer.parameter_names():
            owner, _, leaf = name.removeprefix(f"{layer.name}.").rpartition(".")
            delattr(layer.module.get_submodule(owner), leaf)


def attach(layers: Sequence[ExpertsModule], bound: Sequence[BoundExperts]) -> None:
    """Bind each experts module to its layer. The model must own its config: modules share it."""
    for layer, experts in zip(layers, bound, strict=True):
        if layer.adapter is None:
            layer.contract.config._experts_implementation = "eager"  # generate() switches between the other ones
            layer.module.forward = experts
        else:
            forward = layer.adapter.forward(layer.module, experts)
            layer.module.forward = experts if forward is experts else AdaptedForward(experts, forward)
