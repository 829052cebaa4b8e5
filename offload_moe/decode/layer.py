"""Decoder layers that are two native calls: all up to the block behind attention, and the block.

    residual = x + attention(norm(x));  residual + block(norm(residual))

A layer is one if it is declared (`families/layer_classes.py`), if kernels exist for all that its declaration says of
attention, norms and their order, and if a probe gives what the layer's own code gives. Where the block is a router and
experts whose kernels exist, the router is part of the first call; any other block is called as a module.

Shapes: T rows, each the next token of a sequence, H hidden. Many rows are a prompt's.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.decode.attention import DecodeAttention
from offload_moe.decode.block import plain_block
from offload_moe.decode.delta_step import DeltaStep, delta_step
from offload_moe.decode.hooks import Hooks
from offload_moe.decode.latent_step import LatentStep, latent_step
from offload_moe.decode.mlp import FusedMLP
from offload_moe.decode.norm import norm_kernel
from offload_moe.decode.probe import NUM_CACHED, Refused, Uncovered, agree, answer, probes
from offload_moe.decode.rotary import Embeddings, Rotary, RotaryTable
from offload_moe.decode.router import room_for_routed
from offload_moe.decode.shorten import STEP_TOLERANCE
from offload_moe.decode.step import AttentionStep, attention_step
from offload_moe.decode.wiring import Wiring
from offload_moe.experts.attach import AdaptedForward, bound_experts
from offload_moe.families import find_adapter
from offload_moe.families.cache_name import CACHE
from offload_moe.families.layer_spec import AttentionSpec, LayerSpec, NormSpec
from offload_moe.families.limits import attention_limits, order_limits
from offload_moe.native import kernels

Step = AttentionStep | LatentStep | DeltaStep


@dataclass(frozen=True)
class RowsStep:
    """What every layer of a pass is given beside the hidden states of T rows.

    position_ids: ``[1, T]`` or planes ``[3, 1, T]``. caches: of each row; rows of one sequence follow each other.
    """

    wiring: Wiring
    position_ids: Tensor
    caches: Sequence[Any]

    @cached_property
    def embeddings(self) -> Embeddings:
        """As the model's rotary embedding makes them."""
        return self.wiring.embed_positions(self.position_ids)

    def rotary(self, table: RotaryTable) -> Rotary:
        """As native calls take them."""
        found = None if self.are_many else table.rows(self.position_ids)
        return found or table.prepare(self.embeddings)

    @property
    def num_rows(self) -> int:
        return len(self.caches)

    @property
    def are_many(self) -> bool:
        """Whether they are a prompt's: more than a span takes at once."""
        return self.num_rows > kernels.MAX_ROWS

    def trim(self, attention: Step) -> None:
        """Let the caches of a prompt give back what it alone needed of one layer."""
        if self.are_many:
            for cache, _ in self.sequences:
                attention.trim(cache)

    def places(self, attentions: Iterable[Step]) -> "array[int]":
        """The fields of `rooms_array` of each row in some layers, whose caches count the rows from now on."""
        fields: list[int] = []
        for attention in attentions:
            for cache, num_rows in self.sequences:
                fields += attention.places(cache, num_rows)
        return array("q", fields)

    @cached_property
    def sequences(self) -> list[tuple[Any, int]]:
        """Each cache, and how many rows it has."""
        if len(self.caches) == 1:
            return [(self.caches[0], 1)]
        groups = (list(group) for _, group in groupby(self.caches, key=id))
        return [(group[0], len(group)) for group in groups]

    @cached_property
    def rows(self) -> list["RowsStep"]:
        """Of each row alone."""
        if self.num_rows == 1:
            return [self]
        parts = zip(self.position_ids.split(1, dim=-1), self.caches, strict=True)
        return [RowsStep(self.wiring, position, [cache]) for position, cache in parts]


class NativeLayer:
    """One decoder layer, computed without its modules."""

    def __init__(self, layer: Any, spec: LayerSpec, wiring: Wiring | Uncovered, cache_dtype: torch.dtype) -> None:
        """spec: what the layer computes. wiring: of its decoder. cache_dtype: of what its attention keeps.

        Raises: Uncovered where a kernel is missing.
        """
        limits = [*attention_limits(spec.attention), *order_limits(spec)]
        if limits:
            raise Uncovered(*limits)
        assert spec.before_attention is not None
        assert spec.before_mlp is not None
        self.layer = layer
        self.spec = spec
        self.attention = _attention(layer, spec.attention, cache_dtype)
        self._window = spec.attention.sliding_window
        self._first: nn.Module = layer.get_submodule(spec.before_attention.path)
        self._norm: nn.Module = layer.get_submodule(spec.before_mlp.path)
        self._block = layer.get_submodule(_block_path(spec))
        self.plain = plain_block(layer, spec)
        router = None if self.plain is None else self.plain.route
        self._norms = (_norm_kernel(layer, spec.before_attention), _norm_kernel(layer, spec.before_mlp))
        self.kernel = kernels.LayerKernel(self._norms, self.attention.kernel, router, spec.residual_scale)
        if isinstance(wiring, Uncovered):
            raise wiring
        self.wiring = wiring
        self.rotary = wiring.step_rotary(spec.attention.rotated_dims if self.rotates else 0)

    def bypassed(self) -> list[nn.Module]:
        """Modules that the pass does not call."""
        called = set() if self.plain is not None else set(self._block.modules())
        others = [module for module in self.layer.modules() if module not in called]
        assert {self.layer, self._first, self._norm} <= set(others)
        return others

    def observed(self) -> list[Hooks]:
        """Registries whose observers the pass calls."""
        registries = [self.layer._forward_pre_hooks, self._norm._forward_pre_hooks]
        return registries if self.plain is None else [*registries, self.plain.router._forward_hooks]

    def fits(self, cache: Any, num_tokens: int = 1) -> bool:
        """Whether this layer's part of the cache can take the next tokens in place."""
        return self.attention.takes(cache, self._window, num_tokens)

    def __call__(self, x: Tensor, step: RowsStep) -> Tensor:
        """``[1, T, H] -> [1, T, H]``, fp32 and contiguous; the caches `fit`."""
        self.note_begin()
        places = step.places((self.attention,))
        residual, normed = torch.empty_like(x), torch.empty_like(x)
        plain = self.plain
        routed = None if plain is None else room_for_routed(plain.route, step.num_rows)
        self.kernel.step(x, *step.rotary(self.rotary), places, residual, normed, routed)
        step.trim(self.attention)
        for observer in self._norm._forward_pre_hooks.values():
            observer(self._norm, (residual,))
        if plain is None or routed is None:
            return self._sum(residual, self._call_block(normed))
        for observer in plain.router._forward_hooks.values():
            observer(plain.router, (), routed)
        return self._sum(residual, plain.compute(normed[0], routed))

    def _call_block(self, normed: Tensor) -> Tensor:
        """``[1, T, H] -> [1, T, H]``, a few rows one by one where more rows may change the bits of each."""
        is_whole = isinstance(self._block, FusedMLP) or normed.shape[1] > kernels.MAX_ROWS
        rows = [normed] if is_whole else normed.split(1, dim=1)
        outs = [out[0] if isinstance(out, tuple) else out for out in map(self._block, rows)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _sum(self, residual: Tensor, added: Tensor) -> Tensor:
        scale = self.spec.residual_scale
        return residual + (added if scale == 1.0 else added * scale)

    def note_begin(self) -> None:
        """The layer is about to be computed."""
        for observer in self.layer._forward_pre_hooks.values():
            observer(self.layer, ())

    @property
    def rotates(self) -> bool:
        """Whether its keys depend on their positions."""
        return self.spec.attention.rotary != "none"

    @property
    def hidden_size(self) -> int:
        return self._norms[0].length

    @property
    def dense(self) -> kernels.MlpKernel | None:
        """The kernel of its block, if that is a dense MLP that has one."""
        return self._block.kernel if isinstance(self._block, FusedMLP) and self.spec.router is None else None

    @property
    def captures(self) -> Hooks:
        """Observers of the layer's residual."""
        return self._norm._forward_pre_hooks


def _attention(layer: nn.Module, spec: AttentionSpec, cache_dtype: torch.dtype) -> Step:
    if spec.latent is not None:
        return latent_step(layer, spec, cache_dtype)
    if spec.delta is not None:
        return delta_step(layer.get_submodule(spec.path))
    module: Any = layer.get_submodule(spec.path)
    short = _forward(module)
    if isinstance(short, DecodeAttention) and short.step is not None and spec.rotary == "halves" and spec.chunk is None:
        return short.step
    return attention_step(module, 0 if spec.rotary == "none" else spec.rotated_dims, cache_dtype, spec)


def _block_path(spec: LayerSpec) -> str:
    if spec.router is not None:
        return spec.experts.rpartition(".")[0]
    assert spec.dense is not None
    return spec.dense.gate.rpartition(".")[0]


def _forward(module: nn.Module) -> Any:
    return vars(module).get("forward")


def _norm_kernel(layer: nn.Module, spec: NormSpec) -> kernels.NormKernel:
    kernel = norm_kernel(layer.get_submodule(spec.path))
    if kernel is None:
        raise Uncovered("norms that are not kernel calls")
    return kernel


@torch.inference_mode()
def check_layer(native: NativeLayer) -> None:
    """Compare it with its module: what both give, and leave in the cache. Stand-ins compute in place of its experts.

    The same bits where the module's own parts are kernels, too. Raises: Uncovered.
    """
    plain = native.plain
    attention = _forward(native.layer.get_submodule(native.spec.attention.path))
    has_kernel = isinstance(attention, DecodeAttention) and attention.step is not None
    is_exact = has_kernel and (plain is None or (plain.is_exact and plain.shared is None))
    stand_ins = [module for module in native.layer.modules() if bound_experts(module) is not None]
    bound = [module.forward for module in stand_ins]
    try:
        for module in stand_ins:
            module.forward = _with_stand_in(module)
        for hidden in probes((1, 1, native.hidden_size), torch.float32, torch.device("cpu")):
            theirs = _probe(partial(_call_module, native.layer), native, hidden)
            ours = _probe(native, native, hidden)
            pairs = zip(ours, theirs, strict=True)
            if not all(isinstance(their, Tensor) and _agree(our, their, is_exact=is_exact) for our, their in pairs):
                raise Uncovered("native calls that give other numbers than the layer on probes")
    except Refused as error:
        raise Uncovered("a layer that does not take a probe") from error
    finally:
        for module, forward in zip(stand_ins, bound, strict=True):
            module.forward = forward


def _agree(got: Tensor, expected: Tensor, *, is_exact: bool) -> bool:
    return agree(got, expected, is_exact=is_exact, tolerance=STEP_TOLERANCE)


def _probe(forward: Callable[[Tensor, RowsStep], Any], native: NativeLayer, hidden: Tensor) -> list[Any]:
    """What a layer gives for one token, and what it leaves in the cache."""
    cache = native.attention.probe_cache(NUM_CACHED)
    out = forward(hidden, RowsStep(native.wiring, native.wiring.probe_position, [cache]))
    return [out, *native.attention.kept(cache)]


def _call_module(layer: nn.Module, hidden: Tensor, step: RowsStep) -> Any:
    settings = {"attention_mask": None, CACHE: step.caches[0], "use_cache": True}
    return answer(layer.forward, hidden, position_embeddings=step.embeddings, **settings)


def _with_stand_in(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module with experts, which a stand-in computes."""
    adapter = find_adapter(module)
    if adapter is None:
        return _stand_in
    return AdaptedForward(_stand_in, adapter.forward(module, _stand_in))  # type: ignore[arg-type]


def _stand_in(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Another result for other experts and other weights."""
    return hidden * (top_k_weights * (top_k_index + 1)).sum(-1, keepdim=True)
