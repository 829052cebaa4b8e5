"""A decode step of attention as one kernel call, where the module's parts are ones that the kernel takes.

H hidden, N query heads, M key/value heads, D head dim, S cached tokens, C room in the cache.
"""

from array import array
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from offload_moe.decode.cache import ROOMY, RoomySlidingLayer, begin, give_room, window_of
from offload_moe.decode.dense import QuantLinear
from offload_moe.decode.hooks import Forwards, are_watched, hooks_of
from offload_moe.decode.norm import FusedRMSNorm
from offload_moe.decode.probe import Uncovered, probes
from offload_moe.decode.projections import NAMES
from offload_moe.errors import ConfigError
from offload_moe.families.layer_spec import AttentionSpec, NormSpec
from offload_moe.native import kernels


class CachedStep:
    """What a decode step of attention reads and writes in one layer of a cache."""

    takes_prompts = True  # many tokens at once

    def __init__(
        self,
        layer: int,
        cache_shapes: tuple[tuple[int, int], tuple[int, int]],
        cache_dtype: torch.dtype,
        chunk: int | None = None,
    ) -> None:
        """cache_shapes: heads and dims of keys and of values, or of what the cache holds in their place.

        chunk: as of `AttentionSpec`.
        """
        self._layer, self._chunk = layer, chunk
        self.cache_shapes = cache_shapes
        self.cache_dtype = cache_dtype

    def can_extend(self, cache: Any) -> bool:
        """Whether the cache has room of ours for this layer, of one sequence."""
        if cache is None or self._layer >= len(cache.layers):
            return False
        layer = cache.layers[self._layer]
        return type(layer) in ROOMY and layer.can_extend and layer.kept_dtype == self.cache_dtype

    def takes(self, cache: Any, window: int | None, num_tokens: int) -> bool:
        """Whether the cache can take the next tokens in place, of which each sees this window; None: all before it."""
        if self._layer >= len(cache.layers):
            return False
        layer = cache.layers[self._layer]
        seen = window_of(layer, window, self._chunk)
        return type(layer) in ROOMY and layer.takes(num_tokens, self.cache_dtype, seen)

    def places(self, cache: Any, num_tokens: int = 1) -> list[int]:
        """Of each token the fields of `rooms_array`: the cache counts what the kernel will write."""
        fields: list[int] = cache.layers[self._layer].places(num_tokens, self._chunk)
        return fields

    def begin(self, cache: Any) -> None:
        """Make this layer of a cache that has no tokens yet, where layers of ours are."""
        keys, values = (torch.empty(1, num_heads, 0, dims) for num_heads, dims in self.cache_shapes)
        begin(cache, self._layer, keys, values)

    def trim(self, cache: Any) -> None:
        """Give memory back that only the tokens of a prompt needed."""
        layer = cache.layers[self._layer]
        if isinstance(layer, RoomySlidingLayer):
            layer.trim()

    def kept(self, cache: Any) -> tuple[Tensor, Tensor]:
        """Keys and values in this layer of a cache."""
        layer = cache.layers[self._layer]
        return layer.keys, layer.values

    def probe_cache(self, num_tokens: int) -> DynamicCache:
        """A few random keys and values in this layer, on the CPU."""
        cache = DynamicCache()
        keys, values = (
            probes((1, num_heads, num_tokens, dims), torch.float32, torch.device("cpu"), seed)[1]
            for seed, (num_heads, dims) in enumerate(self.cache_shapes)
        )
        cache.update(keys, values, self._layer)
        give_room(cache, kept=self.cache_dtype)
        return cache


class AttentionStep(CachedStep):
    """One token of one sequence in fp32, without a mask and over the whole cache: the usual decode step."""

    def __init__(self, attention: Any, kernel: kernels.AttentionKernel, chunk: int | None = None) -> None:
        num_heads = attention.k_proj.out_features // attention.head_dim
        super().__init__(attention.layer_idx, ((num_heads, attention.head_dim),) * 2, kernel.cache_dtype, chunk)
        self.kernel = kernel
        self._hooks = hooks_of(attention.modules())
        self._parts = Forwards([module for module in attention.modules() if module is not attention])

    def fits(self, hidden_states: Tensor, cache: Any) -> bool:
        """Whether this call is such a step, and its parts have no hook and no other forward."""
        return (
            hidden_states.shape[:2] == (1, 1)
            and hidden_states.dtype == torch.float32
            and hidden_states.is_cpu
            and self.can_extend(cache)
            and not are_watched(self._hooks)
            and self._parts.are_kept
        )

    def __call__(self, hidden_states: Tensor, cos: Tensor, signed_sin: Tensor, cache: Any) -> Tensor:
        """hidden ``[1, 1, H]`` -> ``[1, 1, H]``; the call `fits`."""
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        self.kernel.step(hidden_states.contiguous(), cos, signed_sin, array("q", self.places(cache)), out)
        return out


def attention_step(
    attention: Any, rotated_dims: int, cache_dtype: torch.dtype, spec: AttentionSpec | None = None
) -> AttentionStep:
    """The step of this module. cache_dtype: of keys and values. spec: None has the usual parts under their usual names.

    Raises: Uncovered where a part is not one that the kernel takes.
    """
    modules: list[Any] = [getattr(attention, name) for name in (*NAMES, "o_proj")]
    linears = [quantized_linear(module) for module in modules]
    scale = None if spec is None else spec.query_scale
    sinks = getattr(attention, "sinks", None)
    if len({module.in_panels for module in modules}) > 1 or not is_fp32(sinks):
        raise Uncovered("attention whose parts are computed in several ways")
    try:
        kernel = kernels.AttentionKernel(
            linears,
            head_dim=attention.head_dim,
            rotated_dims=rotated_dims,
            scaling=attention.scaling,
            norms=_head_norms(attention, spec),
            sinks=sinks,
            rotation="halves" if spec is None else rotation_of(spec),
            is_normed_rotated=spec is not None and spec.is_normed_rotated,
            query_scale=None if scale is None else (scale.step, scale.strength),
            cache_dtype=cache_dtype,
            is_gated=spec is not None and spec.is_query_gated,
        )
    except ConfigError as error:  # such as heads that are no multiple of a vector
        raise Uncovered(f"attention of sizes without a kernel ({str(error).rstrip(chr(46))})") from error
    return AttentionStep(attention, kernel, None if spec is None else spec.chunk)


def rotation_of(spec: AttentionSpec) -> str:
    """As the kernels name it."""
    if spec.rotary != "pairs":
        return "halves"
    return "pairs" if spec.keeps_pairs else "pairs_to_halves"


def quantized_linear(module: Any) -> kernels.Linear:
    """A projection as the kernels take it. Raises: Uncovered."""
    if not isinstance(module, QuantLinear) or not module.has_kernel:
        raise Uncovered("attention whose projections are not quantized, or in a codec without a kernel")
    if not is_fp32(module.bias):
        raise Uncovered("attention whose biases are in another dtype")
    return module.as_projection()


def _head_norms(attention: Any, spec: AttentionSpec | None) -> list[kernels.HeadNorm | None]:
    """Of queries and of keys."""
    if spec is None:
        return [_head_norm(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
    return [_declared_norm(attention, norm) for norm in (spec.query_norm, spec.key_norm)]


def _declared_norm(attention: Any, spec: NormSpec | None) -> kernels.HeadNorm | None:
    if spec is None:
        return None
    if not spec.has_weight:
        return kernels.HeadNorm(weight=torch.ones(attention.head_dim), epsilon=spec.epsilon)
    return _head_norm(getattr(attention, spec.path.rpartition(".")[2]))


def _head_norm(module: nn.Module | None) -> kernels.HeadNorm | None:
    """None where there is none."""
    if module is None:
        return None
    forward = vars(module).get("forward")
    if not isinstance(forward, FusedRMSNorm) or not is_fp32(forward.weight):
        raise Uncovered("attention with norms of queries and keys of another kind")
    return kernels.HeadNorm(weight=forward.weight, epsilon=forward.eps)


def is_fp32(tensor: Tensor | None) -> bool:
    """Whether the kernels read it where it lies; nothing is read of None."""
    return tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())
