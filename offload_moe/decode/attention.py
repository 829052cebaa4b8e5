"""Grouped-query attention of modules without the detours.

The module's own parts do the work, in its own order: projections, head norms, rotary, cache, its attention function,
output projection. What is saved in a decode step: two of three kernel calls for query, key and value, and most small
operations of the rotary embedding; the usual step is one kernel call (`step.py`). Over a cache in bf16 the kernel
attends, for decode steps and prompts alike (`cache_attention.py`); other prompts take the module's own forward.

Shapes: B batch, T new tokens, H hidden, N query heads, M key/value heads, D head dim, S cached tokens.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from offload_moe.decode.cache_attention import CacheAttention
from offload_moe.decode.projections import NAMES, joint_or_separate
from offload_moe.decode.rotary import StepRotary, rotate
from offload_moe.decode.step import AttentionStep
from offload_moe.families.cache_name import take_cache, with_cache

MAX_FLASH_DIM = 256  # above it transformers repeats the key/value heads itself


class DecodeAttention:
    """The forward of one attention module: decode steps, and prompts that the kernel takes; else the module's own."""

    def __init__(self, attention: Any, rotary: StepRotary) -> None:
        self._module = attention
        self._prompt_forward: Callable[..., tuple[Tensor, Tensor | None]] = attention.forward
        self.rotary = rotary
        self._project = joint_or_separate(attention)
        self._head_dim: int = attention.head_dim
        self._layer: int = attention.layer_idx
        self._q_norm: nn.Module | None = getattr(attention, "q_norm", None)
        self._k_norm: nn.Module | None = getattr(attention, "k_norm", None)
        self._arguments = {
            "dropout": 0.0,
            "scaling": attention.scaling,
            "sliding_window": getattr(attention, "sliding_window", None),
        }
        if hasattr(attention, "sinks"):
            self._arguments["s_aux"] = attention.sinks
        self.step: AttentionStep | None = None  # set where it is known to give the same
        self.cached: CacheAttention | None = None  # likewise
        self._interface_name: str | None = None
        self._interface: Callable[..., tuple[Tensor, Tensor | None]] | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = take_cache(kwargs)
        if position_embeddings is not None:
            step, cached = self.step, self.cached
            if step is not None and attention_mask is None and step.fits(hidden_states, cache):
                cos, signed_sin = self.rotary.prepare(position_embeddings)
                return step(hidden_states, cos, signed_sin, cache), None
            if cached is not None and cached.fits(hidden_states, attention_mask, cache):
                out = cached(*self._heads(hidden_states, position_embeddings), cache)
                return self._output(out, hidden_states.shape[:2]), None
            if hidden_states.shape[1] == 1:
                query, key, value = self._heads(hidden_states, position_embeddings)
                if cache is not None:
                    key, value = cache.update(key, value, self._layer)
                settings = {**kwargs, **self._arguments}
                out, weights = self._attend()(self._module, query, key, value, attention_mask, **settings)
                return self._output(out, hidden_states.shape[:2]), weights
        return self._prompt_forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **with_cache(cache),
            **kwargs,
        )

    def _output(self, mixed: Tensor, shape: Sequence[int]) -> Tensor:
        """Heads of B times T tokens -> ``[B, T, H]``. shape: B, T."""
        out: Tensor = self._module.o_proj(mixed.reshape(*shape, -1))
        return out

    def _heads(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[B, N, T, D]``, key and value ``[B, M, T, D]``, rotated."""
        num_new = hidden_states.shape[1]
        shape = (len(hidden_states), num_new, -1, self._head_dim)
        query, key, value = self._project(hidden_states) if num_new == 1 else self._separate(hidden_states)
        query = query.view(shape) if self._q_norm is None else _normed(self._q_norm, query, shape)
        key = key.view(shape) if self._k_norm is None else _normed(self._k_norm, key, shape)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value.view(shape)))
        cos, signed_sin = self.rotary.prepare(position_embeddings)
        return rotate(query, cos, signed_sin), rotate(key, cos, signed_sin), value

    def _separate(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self._module, name)(hidden_states) for name in NAMES)

    def _attend(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The attention function the config names now."""
        name = self._module.config.__dict__["_attn_implementation_internal"]
        if self._interface is None or name != self._interface_name:
            eager = vars(sys.modules[type(self._module).__module__])["eager_attention_forward"]
            self._interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
            if self._interface is sdpa_attention_forward and not self._arguments.keys() & {"s_aux"}:
                self._interface = sdpa_step
            self._interface_name = name
        return self._interface


def sdpa_step(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention for one token per sequence, without its case distinctions.

    query ``[B, N, 1, D]``, key and value ``[B, M, S, D]`` -> ``[B, N, 1, D]``.
    """
    if attention_mask is None and key.shape[-1] <= MAX_FLASH_DIM:
        is_grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=is_grouped), None
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    return out


def _normed(norm: Any, states: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Each head's norm, or one over all heads, whichever its weight is made for."""
    is_of_heads = norm.weight.numel() == shape[-1]
    normed: Tensor = norm(states.view(shape) if is_of_heads else states)
    return normed.view(shape)
