"""The cache of attention per token and layer, derived from the modules and transformers' choice of cache layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from offload_moe.families.layer_spec import AttentionSpec, LayerSpec
from offload_moe.families.limits import attention_limits, order_limits
from offload_moe.families.read_layer import layer_spec
from offload_moe.families.text_model import TextModel
from offload_moe.native.attention import HEAD_DIM_STEP
from offload_moe.plan.attention_work import AttentionWork, describe_work, out_features

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayer:
    """Elements one layer's cache holds: `per_token` for the last `window` tokens (None: all), and a fixed state.

    earlier: elements of earlier states that it keeps, too. is_complete: False if it keeps a state of unknown size
    beside that. is_plain: it keeps keys and values, or latents, and nothing else.
    """

    per_token: int = 0
    window: int | None = None
    fixed: int = 0
    earlier: int = 0
    is_complete: bool = True
    is_plain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """The cache of all layers, and the working memory of each kind of attention.

    is_native: whether native calls compute the attention of prompts, over a cache that is kept in bf16. takes_rows:
    whether a pass may have several tokens of which the last are taken back.
    """

    cache_layers: tuple[CacheLayer, ...]
    works: tuple[AttentionWork, ...]
    is_native: bool = False
    takes_rows: bool = False

    @property
    def keeps_all_tokens(self) -> bool:
        """Whether layers keep only keys and values, or latents, of all tokens."""
        return all(layer.is_complete and layer.window is None and not layer.fixed for layer in self.cache_layers)

    @property
    def has_latents(self) -> bool:
        return any(work.scores for work in self.works)

    @property
    def writes_scores(self) -> bool:
        """Of all heads, on the CPU."""
        return any(work.scores > 1 for work in self.works)


def describe_attention(model: TextModel, *, is_fast_path: bool) -> AttentionShape:
    """The cache and working memory of a model's attention.

    is_fast_path: latent attention is absorbed if possible, and native where the layers are declared.
    """
    from offload_moe.decode.latent import find_latents

    modules = _modules_by_layer(model)
    specs = [layer_spec(layer) for layer in getattr(model.get_decoder(), "layers", ())]
    is_absorbed = is_fast_path and bool(find_latents(model))
    works = {
        describe_work(module, is_absorbed=is_absorbed)
        for found in modules.values()
        for module in found
        if _key_value_width(module)
    }
    return AttentionShape(
        cache_layers=_cache_layers(model.config.get_text_config(decoder=True), modules),
        works=tuple(works),
        is_native=is_fast_path and _are_native(specs),
        takes_rows=is_fast_path and any(specs),
    )


def with_earlier_states(shape: AttentionShape, number: int) -> AttentionShape:
    """The shape of caches that keep so many earlier states of linear attention, so that tokens can be taken back."""
    if not shape.takes_rows:
        return shape
    layers = (replace(layer, earlier=number * layer.fixed) for layer in shape.cache_layers)
    return replace(shape, cache_layers=tuple(layers))


def _are_native(specs: Sequence[LayerSpec | None]) -> bool:
    """Whether every layer of a decoder is declared, and has parts and sizes that the kernels compute of prompts."""
    return bool(specs) and all(
        spec is not None
        and spec.attention.delta is None
        and not attention_limits(spec.attention)
        and not order_limits(spec)
        and _has_sizes(spec.attention)
        for spec in specs
    )


def _has_sizes(spec: AttentionSpec) -> bool:
    dims = (spec.head_dim,) if spec.latent is None else (spec.latent.key_value_rank, spec.rotated_dims)
    return all(dim % HEAD_DIM_STEP == 0 for dim in dims)


def _cache_layers(config: "PreTrainedConfig", modules: dict[int, list[nn.Module]]) -> tuple[CacheLayer, ...]:
    from transformers import DynamicCache
    from transformers.cache_utils import (
        DummyLayer,
        DynamicIndexedLayer,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionCacheLayerMixin,
    )

    # Exact types: a subclass may keep more than keys and values.
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer)
    layers = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        found = modules.get(index, [])
        per_token, fixed = 0, 0
        if isinstance(layer, DynamicLayer):
            per_token = next((width for module in found if (width := _key_value_width(module))), 0)
            per_token = per_token or _configured_width(config)
        if isinstance(layer, DynamicIndexedLayer):  # sparse attention keeps the keys of its indexer too
            per_token += _indexer_width(config)
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            fixed = sum(_state_elements(module) for module in found)
        layers.append(
            CacheLayer(
                per_token=per_token,
                window=getattr(layer, "sliding_window", None),
                fixed=fixed,
                is_complete=type(layer) in plain or fixed > 0,
                is_plain=type(layer) in (DynamicLayer, DynamicSlidingWindowLayer),
            )
        )
    return tuple(layers)


def _modules_by_layer(model: nn.Module) -> dict[int, list[nn.Module]]:
    modules: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(index := getattr(module, "layer_idx", None), int):
            modules.setdefault(index, []).append(module)
    return modules


def _key_value_width(module: nn.Module) -> int:
    """Elements cached per token; 0 if this module caches nothing, or nothing under a known name."""
    if latent := out_features(module, "kv_a_proj_with_mqa"):  # latent attention caches the compressed vector
        return latent
    keys = out_features(module, "k_proj")
    return keys + (out_features(module, "v_proj") or keys)


def _configured_width(config: "PreTrainedConfig") -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * int(heads) * int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _indexer_width(config: "PreTrainedConfig") -> int:
    names = ("index_head_dim", "indexer_head_dim")
    return next((int(width) for name in names if (width := getattr(config, name, None))), 0)


def _state_elements(module: nn.Module) -> int:
    """A gated delta rule's state: the last inputs of its convolution, and one matrix per head.

    Source: transformers/models/qwen3_next/modeling_qwen3_next.py, `Qwen3NextGatedDeltaNet`.
    """
    sizes = [getattr(module, name, None) for name in ("num_v_heads", "head_k_dim", "head_v_dim")]
    convolution = getattr(module, "conv1d", None)
    if not isinstance(convolution, nn.Conv1d) or not all(isinstance(size, int) for size in sizes):
        return 0
    return convolution.weight.numel() + math.prod(size for size in sizes if isinstance(size, int))
