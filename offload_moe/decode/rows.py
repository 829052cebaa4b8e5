"""Several tokens in a pass: of one sequence, of which the last may be taken back, or the next one of each of several.

T rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from offload_moe.decode.cache import GOING_BACK, returning_layers
from offload_moe.decode.dense import QuantLinear
from offload_moe.decode.forward import Seam, SeveralCaches
from offload_moe.decode.next_token import Wanted, token_pass_of
from offload_moe.decode.rotation import rotation_keeper
from offload_moe.decode.states import StatesLayer
from offload_moe.families.cache_name import with_cache
from offload_moe.families.text_model import TextModel


def why_no_rows(hf: TextModel) -> str:
    """Why a pass of several tokens does not have the bits of passes of each; empty where it has."""
    forward = _forward_of(hf)
    if forward is None:
        return "no layer of this model takes the fast path"
    if rotation_keeper(hf) is not None:
        return "this model rotates keys by the length of the sequence"
    if forward.token_pass is not None:
        return ""
    head = hf.get_output_embeddings()
    if not isinstance(head, QuantLinear) or not head.has_kernel:
        return "the output head is not quantized, so logits of several tokens round differently"
    return ""


def takes_rows(hf: TextModel, cache: Any, num_tokens: int) -> bool:
    """Whether so many next tokens can be passed at once behind this cache; where `why_no_rows` is empty."""
    forward = _forward_of(hf)
    if forward is None or not all(type(layer) in GOING_BACK for layer in cache.layers):
        return False
    return forward.takes(cache, num_tokens)


def takes_several(hf: TextModel, num_rows: int) -> bool:
    """Whether one pass may have the next tokens of so many sequences; where `why_no_rows` is empty."""
    forward = _forward_of(hf)
    return forward is not None and forward.has_graphs(num_rows)


def keep_next(cache: Cache) -> None:
    """The last tokens of the next pass may be taken back; where `takes_rows`."""
    for layer in cache.layers:
        if isinstance(layer, StatesLayer):
            layer.keep_next()


@torch.inference_mode()
def roll_back(cache: Cache, num_tokens: int) -> None:
    """Take back the last tokens of the last pass, before which there was a `keep_next`."""
    for layer in returning_layers(cache):
        layer.roll_back(num_tokens)


@torch.inference_mode()
def next_logits(hf: TextModel, tokens: Sequence[int], caches: Sequence[Cache]) -> Tensor:
    """One pass for the next token of each of several sequences: the logits ``[T, V]`` behind them.

    caches: of each sequence, which gets the token; different ones, `MAX_ROWS` at most, of which `takes_rows` is true.
    After an error they are as before. Raises: UnsupportedModelError, and what a forward of one token raises.
    """
    lengths = [[_length(layer) for layer in cache.layers] for cache in caches]
    for cache in caches:
        keep_next(cache)
    try:
        logits = _logits_of(hf, torch.tensor([tokens]), SeveralCaches(caches))
    except BaseException:
        for cache, before in zip(caches, lengths, strict=True):
            _shorten(cache, before)
        raise
    return logits[0]


def _logits_of(hf: TextModel, ids: Tensor, several: Any) -> Tensor:
    """``[1, T, V]``, by the pass itself where it has the output head."""
    token_pass, wanted = token_pass_of(hf), Wanted()
    if token_pass is not None and token_pass.is_clear:
        hf.get_decoder()(input_ids=ids, **with_cache(several), wanted=wanted)
        assert wanted.logits is not None
        return wanted.logits[None]
    logits: Tensor = hf(ids, **with_cache(several), use_cache=True, return_dict=True).logits
    return logits


def _shorten(cache: Cache, lengths: Sequence[int]) -> None:
    """Take back what a pass that was not completed has counted in some layers."""
    for layer, length in zip(returning_layers(cache), lengths, strict=True):
        if excess := _length(layer) - length:
            layer.roll_back(excess)


def _length(layer: Any) -> int:
    """Tokens that a layer of a cache has counted."""
    length: int = layer.num_passed if isinstance(layer, StatesLayer) else layer.get_seq_length()
    return length


def _forward_of(hf: TextModel) -> Seam | None:
    forward = vars(hf.get_decoder()).get("forward")
    return forward if isinstance(forward, Seam) else None
