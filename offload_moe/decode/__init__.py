"""The fast path: what transformers' own code spends per layer on small operations, spent once or not at all.

No model code is copied and nothing is compiled at run time. Modules of prompts and of decode steps alike (norms, MLPs,
attention, routers, experts) are recognized by probing what they compute, and get another forward. A few new tokens of
one sequence pass through the decoder's forward alone: a plan of native spans, made from what the layers' classes
declare; `pass_rows` takes tokens of several sequences through it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from offload_moe.decode.cache import give_room
from offload_moe.decode.delta import fuse_delta_rules
from offload_moe.decode.forward import DecoderForward, NextTokens
from offload_moe.decode.head import head_alone
from offload_moe.decode.latent import absorb_latents
from offload_moe.decode.mlp import fuse_mlps
from offload_moe.decode.norm import fuse_layer_norms, fuse_norms
from offload_moe.decode.plan import Planned, plan_pass
from offload_moe.decode.report import DENSE, LayerPath, layer_paths, tell_reasons
from offload_moe.decode.router import shorten_routers
from offload_moe.decode.rows import keep_next, next_logits, roll_back, takes_rows, takes_several, why_no_rows
from offload_moe.decode.shorten import shorten_attention
from offload_moe.families.cache_name import cache_in
from offload_moe.families.text_model import TextModel
from offload_moe.residency.hierarchy import Hierarchy

__all__ = [
    "FastPath",
    "LayerPath",
    "keep_next",
    "make_fast",
    "make_room",
    "next_logits",
    "pass_rows",
    "roll_back",
    "takes_rows",
    "takes_several",
    "why_no_rows",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class FastPath:
    """How a decode step passes each layer.

    why_none: why no layer is computed by native calls alone, whatever it is; empty where some may be.
    """

    why_none: str
    layers: tuple[LayerPath, ...]

    @property
    def slow_layers(self) -> tuple[LayerPath, ...]:
        """Those that a decode step passes neither in a native span nor in the device pass."""
        return tuple(layer for layer in self.layers if layer.kind not in ("span", "card"))

    @property
    def is_worth_a_notice(self) -> bool:
        """Whether layers with experts take the slow path, and not because the numbers or the device were chosen so."""
        return not self.why_none and any(layer.reasons != DENSE for layer in self.slow_layers)

    def __str__(self) -> str:
        """In one line: how many layers take the fast path, and why the others do not."""
        if self.why_none:
            return f"Decode takes the slow path through all {len(self.layers)} layers: {self.why_none}."
        slow = self.slow_layers
        if not slow and all(layer.kind == "card" for layer in self.layers):
            return f"Decode takes the device pass through all {len(self.layers)} layers."
        if not slow:
            return f"Decode takes the fast path through all {len(self.layers)} layers."
        reasons = tell_reasons(layer.reasons for layer in slow)
        return f"Decode takes the slow path through {len(slow)} of {len(self.layers)} layers: {reasons}."


def make_fast(
    hf: TextModel,
    *,
    is_exact: bool,
    context: int | None = None,
    kept: torch.dtype | None = None,
    hierarchy: Hierarchy | None = None,
) -> FastPath:
    """Make the decode steps of a loaded model cheaper, in place.

    is_exact: only what gives the same bits. Otherwise results may differ by the rounding of the dtype. context: tokens
    that memory was planned for. kept: the dtype of keys and values in the cache; None: as they are computed.
    hierarchy: where the experts are.
    """
    if not is_exact:
        absorb_latents(hf)
    fuse_mlps(hf)
    fuse_norms(hf, is_exact=is_exact)
    if not is_exact:
        fuse_layer_norms(hf)
        fuse_delta_rules(hf)
    cache_dtype = kept or torch.float32
    shorten_attention(hf, is_exact=is_exact, cache_dtype=cache_dtype)
    make_room(hf, context, kept)
    if not is_exact:
        shorten_routers(hf)
    why_none = _why_none(hf, is_exact=is_exact)
    planned = Planned(plan=None, paths={}) if why_none else plan_pass(hf, hierarchy, cache_dtype)
    if planned.plan is not None:
        decoder = hf.get_decoder()
        decoder.forward = DecoderForward(decoder, planned.plan)
        decoder.forward.head_alone = head_alone(hf, planned.plan.wiring)
    return FastPath(why_none=why_none, layers=layer_paths(hf, planned.paths))


def pass_rows(hf: TextModel, sequences: Sequence[NextTokens]) -> Tensor | None:
    """The next tokens of several sequences, each with a cache of its own, in one pass of the decoder.

    sequences: of each the ids ``[n]`` of its next tokens, and its cache, which gets them; `MAX_ROWS` tokens in all at
    most. Returns what the decoder returns for each, ``[T, H]`` behind its last norm, in the order given and with the
    bits of a forward of each token alone. None where the model or a cache does not allow it: nothing has changed then.
    Models whose keys rotate by the length of the sequence do not. Raises: TransferError, ModelClosed.
    """
    forward = vars(hf.get_decoder()).get("forward")
    return forward.pass_rows(sequences) if isinstance(forward, DecoderForward) else None


def make_room(hf: TextModel, context: int | None, kept: torch.dtype | None) -> None:
    """Let the caches that the model is given grow in place. context, kept: as of `RoomyLayer`."""
    hf.get_decoder().register_forward_pre_hook(partial(_give_room, context, kept), with_kwargs=True)


def _why_none(hf: TextModel, *, is_exact: bool) -> str:
    if is_exact:
        return "its numbers are kept bit for bit"
    if hf.device.type != "cpu" or hf.dtype != torch.float32:
        return f"native calls are for fp32 on the CPU, and this model computes in {hf.dtype} on {hf.device.type}"
    return ""


def _give_room(
    context: int | None, kept: torch.dtype | None, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    cache = cache_in(kwargs)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache  # the other one does not grow
    if isinstance(cache, Cache):
        give_room(cache, context, kept)
