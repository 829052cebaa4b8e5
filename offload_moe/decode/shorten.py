"""Which attention modules are shortened: those that have the parts, and whose results the short way gives."""

import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from offload_moe.decode.attention import DecodeAttention
from offload_moe.decode.cache import give_room
from offload_moe.decode.cache_attention import CacheAttention
from offload_moe.decode.probe import NUM_CACHED, Refused, Uncovered, agree, answer, probes, structure
from offload_moe.decode.projections import NAMES
from offload_moe.decode.rotary import StepRotary
from offload_moe.decode.step import AttentionStep, attention_step
from offload_moe.families.cache_name import with_cache

CHILDREN = frozenset({*NAMES, "o_proj", "q_norm", "k_norm"})
PARAMETERS = frozenset({"sinks"})
ATTRIBUTES = ("head_dim", "scaling", "layer_idx", "config")
STEP_TOLERANCE = 1e-2  # of a kernel call: a last bit before int8 activations may round one of them the other way

PositionEmbeddings = tuple[Tensor, Tensor]


def shorten_attention(model: nn.Module, *, is_exact: bool, cache_dtype: torch.dtype = torch.float32) -> int:
    """Give every attention module that is recognized the short decode step. Returns how many.

    cache_dtype: of the keys and values that kernel calls read and write.
    """
    positions = probe_positions(model)
    embeddings = position_embeddings(model, positions)
    if embeddings is None:
        return 0
    num_angles = embeddings[0].shape[-1]
    rotaries = ((StepRotary(is_half=False), num_angles), (StepRotary(is_half=True), 2 * num_angles))
    rotary_of: dict[Hashable, StepRotary | None] = {}
    has_step: dict[Hashable, bool] = {}
    has_cached: dict[Hashable, bool] = {}
    num_shortened = 0
    modules: list[Any] = [module for module in model.modules() if _is_candidate(module)]
    for module in modules:
        kind = structure(module)
        if kind not in rotary_of:
            rotary_of[kind] = next(
                (
                    rotary
                    for rotary, rotated_dims in rotaries
                    if rotated_dims <= module.head_dim
                    and _agrees(module, DecodeAttention(module, rotary), embeddings, positions, is_exact=is_exact)
                ),
                None,
            )
        rotary = rotary_of[kind]
        if rotary is not None:
            short = DecodeAttention(module, rotary)
            rotated_dims = next(dims for each, dims in rotaries if each is rotary)
            if not is_exact:
                short.step = _step(module, rotated_dims, cache_dtype)
                if short.step is not None and kind not in has_step:
                    has_step[kind] = _steps_alike(module, short, short.step, embeddings)
                short.step = short.step if has_step.get(kind) else None
                _give_cached(module, short, embeddings, has_cached)
            module.forward = short
            num_shortened += 1
    return num_shortened


def _step(module: Any, rotated_dims: int, cache_dtype: torch.dtype) -> AttentionStep | None:
    """The kernel call, if there is one."""
    try:
        return attention_step(module, rotated_dims, cache_dtype)
    except Uncovered:
        return None


def _give_cached(
    module: Any, short: DecodeAttention, embeddings: PositionEmbeddings, has_cached: dict[Hashable, bool]
) -> None:
    """Set the kernel call of attention over a cache, as `_give_step` does."""
    try:
        cached = CacheAttention(module)
    except Uncovered:
        return
    kind = structure(module)
    if kind not in has_cached:
        has_cached[kind] = all(_attends_alike(module, short, cached, embeddings, count) for count in (1, 3))
    short.cached = cached if has_cached[kind] else None


def probe_positions(model: Any) -> Tensor:
    """``[2, 1]``: an early position, and the last one, where scaling by position would show."""
    last = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 4096) - 1
    return torch.tensor([[NUM_CACHED], [last]])


@torch.inference_mode()
def position_embeddings(model: nn.Module, positions: Tensor) -> PositionEmbeddings | None:
    """cos and sin ``[2, 1, D]`` of the model's one rotary embedding; None where it has none or several."""
    rotaries = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if len(rotaries) != 1:
        return None
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    try:
        probe = torch.zeros(1, dtype=weight.dtype, device=weight.device)
        embeddings = answer(rotaries[0], probe, positions.to(weight.device))
    except Refused:  # such as one that takes the layer's type: the model mixes embeddings
        return None
    is_plain = isinstance(embeddings, tuple) and len(embeddings) == 2 and embeddings[0].dim() == 3
    return embeddings if is_plain else None


def _is_candidate(module: Any) -> bool:
    names = {name for name, _ in module.named_children()}
    if not {*NAMES, "o_proj"} <= names <= CHILDREN or not set(module._parameters) <= PARAMETERS:
        return False
    if not all(hasattr(module, name) for name in ATTRIBUTES):
        return False
    has_interface = hasattr(sys.modules[type(module).__module__], "eager_attention_forward")
    is_clipped = getattr(module.config, "clip_qkv", None) is not None
    is_gated = module.q_proj.out_features != module.o_proj.in_features
    return has_interface and not is_clipped and not is_gated


@torch.inference_mode()
def _agrees(
    module: Any, step: DecodeAttention, embeddings: PositionEmbeddings, positions: Tensor, *, is_exact: bool
) -> bool:
    """Whether module and step give the same on two sequences over a short random context, with and without a mask."""
    device, dtype = embeddings[0].device, embeddings[0].dtype
    mask = torch.zeros(2, 1, 1, NUM_CACHED + 1, device=device, dtype=dtype)
    mask[1, :, :, :2] = torch.finfo(dtype).min
    for hidden in probes((2, 1, module.q_proj.in_features), dtype, device):
        for each_mask in (None, mask):
            arguments: dict[str, Any] = {"attention_mask": each_mask, "position_ids": positions.to(device)}
            arguments |= {"position_embeddings": embeddings}
            try:
                cache = probe_cache(module, hidden)
                expected = answer(module.forward, hidden, **with_cache(cache), **arguments)[0]
            except Refused:
                return False
            got = step(hidden, **with_cache(probe_cache(module, hidden)), **arguments)[0]
            if not agree(got, expected, is_exact=is_exact):
                return False
    return True


def _kept(cache: Cache) -> list[Tensor]:
    """Keys and values of the last layer, which has some."""
    layer = cache.layers[-1]
    assert isinstance(layer, DynamicLayer)
    assert layer.keys is not None
    assert layer.values is not None
    return [layer.keys, layer.values]


@torch.inference_mode()
def _steps_alike(module: Any, short: DecodeAttention, step: AttentionStep, embeddings: PositionEmbeddings) -> bool:
    """Whether the kernel call gives what the separate operations give, and leaves the same in the cache."""
    cos, sin = (part[1:] for part in embeddings)
    for hidden in probes((1, 1, module.q_proj.in_features), cos.dtype, cos.device):
        caches = [probe_cache(module, hidden), probe_cache(module, hidden)]
        results = []
        for cache, short.step in zip(caches, (None, step), strict=True):
            give_room(cache, kept=step.cache_dtype)
            results.append(short(hidden, position_embeddings=(cos, sin), **with_cache(cache))[0])
        results += [part for cache in caches for part in _kept(cache)]
        got, expected = (results[1], *results[4:]), (results[0], *results[2:4])
        pairs = zip(got, expected, strict=True)
        if not all(agree(ours, theirs, is_exact=False, tolerance=STEP_TOLERANCE) for ours, theirs in pairs):
            return False
    return True


@torch.inference_mode()
def _attends_alike(
    module: Any, short: DecodeAttention, cached: CacheAttention, embeddings: PositionEmbeddings, num_new: int
) -> bool:
    """Whether the kernel attends as the module's function does, over the same cache, and leaves the same in it."""
    cos, sin = (part[1:].expand(-1, num_new, -1).contiguous() for part in embeddings)
    if cos.dtype != torch.float32 or not cos.is_cpu:
        return False
    mask = torch.full((num_new, NUM_CACHED + num_new), torch.finfo(cos.dtype).min).triu(NUM_CACHED + 1)[None, None]
    for hidden in probes((1, num_new, module.q_proj.in_features), cos.dtype, cos.device):
        ours, theirs = probe_cache(module, hidden), probe_cache(module, hidden)
        for cache in (ours, theirs):
            give_room(cache, kept=cached.cache_dtype)
        if not cached.fits(hidden, mask, ours):
            return False
        arguments: dict[str, Any] = {"attention_mask": mask, "position_embeddings": (cos, sin)}
        expected = [answer(module.forward, hidden, **with_cache(theirs), **arguments)[0]]
        short.cached, step, short.step = cached, short.step, None
        got = [short(hidden, **with_cache(ours), **arguments)[0]]
        short.cached, short.step = None, step
        for each, cache in ((got, ours), (expected, theirs)):
            each += _kept(cache)
        pairs = zip(got, expected, strict=True)
        if not all(agree(mine, other, is_exact=False, tolerance=STEP_TOLERANCE) for mine, other in pairs):
            return False
    return True


def probe_cache(module: Any, hidden: Tensor) -> DynamicCache:
    """A few random keys and values in the module's own layer."""
    cache = DynamicCache()
    num_heads = module.k_proj.out_features // module.head_dim
    shape = (hidden.shape[0], num_heads, NUM_CACHED, module.head_dim)
    keys, values, *_ = probes(shape, hidden.dtype, hidden.device)
    cache.update(keys, values, module.layer_idx)
    return cache
