"""Several next tokens of one sequence in a pass, of which the last may be taken back."""

from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from offload_moe.decode.cache import ROOMY
from offload_moe.decode.dense import QuantLinear
from offload_moe.decode.forward import Seam
from offload_moe.decode.rotation import rotation_keeper


def why_no_rows(hf: PreTrainedModel) -> str:
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


def takes_rows(hf: PreTrainedModel, cache: Any, num_tokens: int) -> bool:
    """Whether so many next tokens can be passed at once behind this cache; where `why_no_rows` is empty."""
    forward = _forward_of(hf)
    return (
        forward is not None and all(type(layer) in ROOMY for layer in cache.layers) and forward.takes(cache, num_tokens)
    )


@torch.inference_mode()
def roll_back(cache: Cache, num_tokens: int) -> None:
    """Take back the last tokens of the last pass, for which `takes_rows` was true."""
    for layer in cache.layers:
        layer.roll_back(num_tokens)


def _forward_of(hf: PreTrainedModel) -> Seam | None:
    forward = vars(hf.get_decoder()).get("forward")
    return forward if isinstance(forward, Seam) else None
