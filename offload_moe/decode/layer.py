"""Decoder layers whose decode step is two kernel calls: all up to the experts, and the experts.

    residual = x + attention(norm(x));  residual + block(norm(residual))

is what a layer of most families does. Where the block is a router and experts, the router is part of the first call;
any other block is called as it is. The same kernels as before run in the same order: the same bits, but for the gate
of a shared expert.

Layers of the first kind in a row are one call, as long as their experts are resident: see `run.py`.

Shapes: H hidden. One token of one sequence.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.decode.attention import DecodeAttention
from offload_moe.decode.block import plain_block
from offload_moe.decode.cache import Room, give_room
from offload_moe.decode.hooks import are_watched, have_only_observers, hooks_of
from offload_moe.decode.norm import FusedRMSNorm
from offload_moe.decode.probe import Refused, Uncovered, agree, answer, probes, structure
from offload_moe.decode.shorten import position_embeddings, probe_cache, probe_positions
from offload_moe.decode.span import LayerSpan, Rotary, span_kind
from offload_moe.experts.attach import BoundExperts
from offload_moe.experts.probe import ResidualCapture
from offload_moe.native import kernels
from offload_moe.residency.hierarchy import Hierarchy

NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """What a layer is made of, if all but its block are kernel calls."""

    first: Any
    second: Any
    norm_kernels: tuple[kernels.NormKernel, kernels.NormKernel]
    attention: DecodeAttention
    block: Any

    @classmethod
    def of(cls, layer: Any) -> "LayerParts":
        """Raises: Uncovered when they are others."""
        norms: list[Any] = [getattr(layer, name, None) for name in NORMS]
        others = [module for module in layer.children() if module not in norms]
        if None in norms or len(others) != 2:
            raise Uncovered("a layer of other parts than two norms, attention and one block")
        attention = _forward(others[0])
        if not isinstance(attention, DecodeAttention):
            raise Uncovered("attention of a kind that is not known, or that gives other numbers on probes")
        if attention.step is None:
            raise Uncovered(attention.why_no_step)
        return cls(
            first=norms[0],
            second=norms[1],
            norm_kernels=(_norm_kernel(norms[0]), _norm_kernel(norms[1])),
            attention=attention,
            block=others[1],
        )


class LayerStep:
    """The forward of one decoder layer: decode steps are done here, anything else by the layer itself."""

    def __init__(self, layer: Any) -> None:
        """Raises: Uncovered when a part is not one that can take part."""
        parts = LayerParts.of(layer)
        first, self._norm, block = parts.first, parts.second, parts.block
        attention = parts.attention
        assert attention.step is not None
        self.layer = layer
        self.attention = attention.step
        self.run: LayerSpan | None = None  # that this layer is part of
        self._layer_forward = layer.forward
        self._rotary = attention.rotary
        self._block = block
        self.plain = plain = plain_block(block)
        router = None if plain is None else plain.route.kernel
        self.kernel = kernels.LayerKernel(parts.norm_kernels, self.attention.kernel, router)
        # Only residual captures and a router's observers may watch what the pass does not call; it runs them itself.
        self._hooks = hooks_of([first, self.attention.module])
        self._hooks += [self._norm._forward_hooks, self._norm._forward_pre_hooks_with_kwargs]
        if plain is not None:
            others = [module for module in block.children() if module not in (plain.router, plain.experts)]
            self._hooks += [*hooks_of([block, *others])]
            self._hooks += [plain.router._forward_pre_hooks, plain.router._forward_hooks_with_kwargs]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and hidden_states.shape[1] == 1:
            done = self._done(hidden_states, **kwargs)
            if done is not None:
                return done
        return self._layer_forward(hidden_states, *args, **kwargs)

    def fits(self, hidden_states: Tensor, cache: Any) -> bool:
        """Whether this call is such a step, and nobody waits for a module that would not be called."""
        captures = self._norm._forward_pre_hooks
        return (
            not are_watched(self._hooks)
            and (not captures or all(isinstance(hook, ResidualCapture) for hook in captures.values()))
            and (self.plain is None or have_only_observers([self.plain.router._forward_hooks]))
            and self.attention.fits(hidden_states, cache)
        )

    def _done(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Rotary | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Tensor | None:
        """``[1, 1, H]`` -> ``[1, 1, H]``; None where this is another kind of step."""
        if self.run is not None and self.run.has_passed(self, hidden_states):
            return hidden_states
        if attention_mask is not None or position_embeddings is None or not self.fits(hidden_states, past_key_values):
            return None
        rotary = self._rotary.prepare(position_embeddings)
        run = self.run
        if run is not None and run.begins_with(self) and run.fits(hidden_states, past_key_values):
            return run(hidden_states, rotary, past_key_values)
        room = self.attention.extend(past_key_values)
        if room is None:
            return None
        done = self._step(hidden_states.contiguous(), rotary, room)
        if run is not None:
            run.watch(self, hidden_states, done, (position_embeddings, past_key_values))
        return done

    def _step(self, x: Tensor, rotary: Rotary, room: Room) -> Tensor:
        residual, normed = torch.empty_like(x), torch.empty_like(x)
        plain = self.plain
        routed = None if plain is None else plain.route.empty()
        (cos, signed_sin), (keys, values, length) = rotary, room
        self.kernel.step(x, cos, signed_sin, keys, values, length, residual, normed, routed)
        self.keep(residual)
        if plain is None or routed is None:
            out = self._block(normed)
            return residual + (out[0] if isinstance(out, tuple) else out)
        for observer in plain.router._forward_hooks.values():
            observer(plain.router, (), routed)
        return residual + plain.compute(normed[0], routed)

    @property
    def num_captures(self) -> int:
        """How many want to know the layer's residual."""
        return len(self._norm._forward_pre_hooks)

    def keep(self, residual: Tensor) -> None:
        """Tell them."""
        for capture in self._norm._forward_pre_hooks.values():
            capture(self._norm, (residual,))


def shorten_layers(model: nn.Module, hierarchy: Hierarchy | None) -> int:
    """Give every decoder layer that is recognized the short decode step. Returns how many."""
    embeddings = position_embeddings(model, probe_positions(model))
    if embeddings is None:
        return 0
    is_alike: dict[Hashable, bool] = {}
    num_shortened = 0
    for layer in [module for module in model.modules() if all(hasattr(module, name) for name in NORMS)]:
        try:
            step = LayerStep(layer)
        except Uncovered:
            continue
        kind = structure(layer)
        if kind not in is_alike:
            is_alike[kind] = _steps_alike(layer, step, embeddings)
        if is_alike[kind]:
            layer.forward = step
            num_shortened += 1
    if hierarchy is not None:
        _join(model, hierarchy)
    return num_shortened


def _join(model: nn.Module, hierarchy: Hierarchy) -> None:
    """Make a run of each row of layers that follow each other and can take part."""
    for siblings in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for shape, row in groupby((_forward(layer) for layer in siblings), key=partial(span_kind, hierarchy)):
            if shape is not None:
                steps = list(row)
                run = LayerSpan(steps, hierarchy)
                for step in steps:
                    step.run = run


def _forward(module: nn.Module) -> Any:
    return vars(module).get("forward")


def _norm_kernel(module: nn.Module) -> kernels.NormKernel:
    norm = _forward(module)
    if not isinstance(norm, FusedRMSNorm) or norm.kernel is None:
        raise Uncovered("norms that are not kernel calls")
    return norm.kernel


@torch.inference_mode()
def _steps_alike(layer: Any, step: LayerStep, embeddings: Rotary) -> bool:
    """Whether step and layer give the same, here and in the cache. No expert is read: others stand in for them.

    The same bits, unless a shared expert's gate is computed in another order of additions.
    """
    is_exact = step.plain is None or step.plain.shared is None
    cos, sin = (part[1:] for part in embeddings)
    stand_ins = [module for module in layer.modules() if isinstance(_forward(module), BoundExperts)]
    bound = [module.forward for module in stand_ins]
    for module in stand_ins:
        module.forward = _stand_in
    try:
        for hidden in probes((1, 1, step.attention.module.q_proj.in_features), cos.dtype, cos.device):
            theirs = _probe(partial(answer, layer.forward), step, hidden, (cos, sin))
            ours = _probe(step, step, hidden, (cos, sin))
            pairs = zip(ours, theirs, strict=True)
            if not all(isinstance(their, Tensor) and agree(our, their, is_exact=is_exact) for our, their in pairs):
                return False
    except Refused:
        return False
    finally:
        for module, forward in zip(stand_ins, bound, strict=True):
            module.forward = forward
    return True


def _probe(forward: Callable[..., Any], step: LayerStep, hidden: Tensor, embeddings: Rotary) -> list[Any]:
    """What a layer gives for one token, and what it leaves in the cache."""
    cache = probe_cache(step.attention.module, hidden)
    give_room(cache)
    settings = {"attention_mask": None, "past_key_values": cache, "use_cache": True}
    out = forward(hidden, position_embeddings=embeddings, **settings)
    return [out, cache.layers[-1].keys, cache.layers[-1].values]


def _stand_in(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Another result for other experts and other weights."""
    return hidden * (top_k_weights * (top_k_index + 1)).sum(-1, keepdim=True)
