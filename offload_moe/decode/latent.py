"""Absorbed multi-head latent attention (DeepSeek, Kimi and their relatives).

Their cache holds one compressed latent per token. transformers expands the whole of it into keys and values of every
head, in every layer, for every token. Since ``k = W_k c`` and ``v = W_v c``, scores are ``(W_k^T q) . c`` and the
output is ``W_v`` times the mean of ``c``: queries move into the latent space instead, and nothing is expanded.

Shapes: B batch, N heads, T new tokens, S all tokens, R latent rank, P rotated dims, K unrotated key dims, V value dims.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.2 and appendix C.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from offload_moe.decode.dense import NarrowLinear, exact_bf16

NAME = "offload_moe_latent"  # and the name of the attention that prompts take: "offload_moe_latent_sdpa"
NUMBERS = ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # linears that are not quantized
MAX_SCORES = 1 << 24  # scores that exist at once, all heads together: 64 MiB

Attended = tuple[Tensor, Tensor | None]


class LatentAttention:
    """The attention function of models whose `expand_kv` keeps latents: absorbs decode steps, expands for prompts."""

    def __init__(self, base: str) -> None:
        self._base = base

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Attended:
        """For latent modules: key is the latent ``[B, 1, S, R]``, value the rotated key ``[B, 1, S, P]``."""
        if isinstance(module.__dict__.get("expand_kv"), KeptLatents):
            if pays(module, query.shape[2], key.shape[2]) and (attention_mask is not None or query.shape[2] == 1):
                return absorbed(module, query, key, value, attention_mask, kwargs["scaling"]), None
            key, value = type(module).expand_kv(module, key, value)
        width = value.shape[-1]
        if query.is_cpu and self._base == "sdpa" and width < key.shape[-1]:
            # With values as wide as keys torch writes no scores [B, N, T, S] down on the CPU, and is quicker.
            value = nn.functional.pad(value, (0, key.shape[-1] - width))
        out, shares = self._attend(module)(module, query, key, value, attention_mask, **kwargs)
        return out[..., :width], shares

    def _attend(self, module: Any) -> Callable[..., Attended]:
        eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return ALL_ATTENTION_FUNCTIONS.get_interface(self._base, eager)


class KeptLatents:
    """In place of a module's `expand_kv`: hands the latents on, as long as our function is the one that gets them."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        module = self._module
        if module.config._attn_implementation.startswith(NAME):
            return latent, rotated
        expanded: tuple[Tensor, Tensor] = type(module).expand_kv(module, latent, rotated)
        return expanded


def pays(module: Any, num_new: int, num_all: int) -> bool:
    """Whether the longer products of the latent space cost less than expanding; never for a prompt from its start."""
    expansion = module.kv_lora_rank * (module.qk_nope_head_dim + module.v_head_dim)
    longer = 2 * module.kv_lora_rank - module.qk_nope_head_dim - module.v_head_dim
    return num_new < num_all and num_new * longer < expansion


def absorbed(
    module: Any, query: Tensor, latent: Tensor, rotated: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """query ``[B, N, T, K + P]`` -> ``[B, T, N, V]``; mask ``[B, 1, T, S]``, boolean or added."""
    key_weight, value_weight = _weights(module)
    batch, num_heads, num_new, _ = query.shape
    latent, rotated = latent[:, 0], rotated[:, 0]
    out = query.new_empty(batch, num_new, num_heads, module.v_head_dim)
    step = max(1, MAX_SCORES // (batch * num_heads * latent.shape[1]))
    for first in range(0, num_new, step):
        part = query[:, :, first : first + step]
        unrotated, turned = part.split([module.qk_nope_head_dim, rotated.shape[-1]], dim=-1)
        inside = _per_head(unrotated, key_weight)
        scores = torch.matmul(_rows(inside), latent.transpose(1, 2))
        scores = scores.baddbmm_(_rows(turned), rotated.transpose(1, 2)).mul_(scaling)
        part_mask = None if mask is None else mask[:, :, first : first + step]
        shares = _softmax(scores.view(batch, num_heads, -1, scores.shape[-1]), part_mask)
        mean = torch.matmul(_rows(shares), latent).view(inside.shape)
        out[:, first : first + step] = _per_head(mean, value_weight.transpose(1, 2)).transpose(1, 2)
    return out


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    """Views of `kv_b_proj`: ``[N, K, R]`` and ``[N, V, R]``."""
    keys, values = module.qk_nope_head_dim, module.v_head_dim
    weight = _numbers(module.kv_b_proj).view(-1, keys + values, module.kv_lora_rank)
    return weight[:, :keys], weight[:, keys:]


def _numbers(linear: nn.Linear | NarrowLinear) -> Tensor:
    """Its weight in the dtype in which it computes."""
    return linear.weight.to(linear.dtype) if isinstance(linear, NarrowLinear) else linear.weight


def _narrow(module: Any) -> None:
    """Keep what is not quantized in bf16 where these are the same numbers."""
    for name in NUMBERS:
        linear = getattr(module, name, None)
        if type(linear) is not nn.Linear or linear.weight.dtype != torch.float32:
            continue
        narrow = exact_bf16(linear.weight.detach())
        if narrow is not None:
            bias = None if linear.bias is None else linear.bias.detach()
            setattr(module, name, NarrowLinear(narrow, bias, linear.weight.dtype))


def _per_head(states: Tensor, weight: Tensor) -> Tensor:
    """``[B, N, T, X]`` times each head's ``[X, Y]``."""
    return torch.matmul(states, weight)


def _rows(states: Tensor) -> Tensor:
    """``[B, N, T, X] -> [B, N * T, X]``: the latent is the same for all heads, so they are rows of one product."""
    return states.flatten(1, 2)


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        mask = mask[..., : scores.shape[-1]]
        scores = (
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
        )
    return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)


def absorb_latents(model: nn.Module) -> int:
    """Let every latent attention that is recognized keep its latents. Returns how many."""
    num_absorbed = 0
    for module in find_latents(model):
        if _expands_as_expected(module):
            module.config._attn_implementation = _registered(module.config._attn_implementation)
            module.expand_kv = KeptLatents(module)
            _narrow(module)
            num_absorbed += 1
    return num_absorbed


def find_latents(model: nn.Module) -> list[Any]:
    """Latent attentions that may be absorbed.

    Sparse relatives (an `indexer` child) read the name of the attention function and are left alone.
    """
    modules: list[Any] = [module for module in model.modules() if _is_candidate(module)]
    return [] if any(hasattr(module, "indexer") for module in modules) else modules


def _registered(base: str) -> str:
    """The name under which transformers finds our function; masks are made as for `base`."""
    if base.startswith(NAME):
        return base
    name = f"{NAME}_{base}"
    ALL_ATTENTION_FUNCTIONS.register(name, LatentAttention(base))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _is_candidate(module: Any) -> bool:
    linear = getattr(module, "kv_b_proj", None)
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and hasattr(type(module), "expand_kv")
        and hasattr(sys.modules[type(module).__module__], "eager_attention_forward")
        and all(hasattr(module, name) for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "config"))
    )


@torch.inference_mode()
def _expands_as_expected(module: Any) -> bool:
    """Whether its keys are ``[W_k c, rotated]`` and its values ``W_v c``, head by head."""
    weight = module.kv_b_proj.weight
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 1, 3, module.kv_lora_rank), (1, 1, 3, module.qk_rope_head_dim))
    latent, rotated = (torch.randn(shape, generator=generator).to(weight) for shape in shapes)
    key, value = module.expand_kv(latent, rotated)
    key_weight, value_weight = _weights(module)
    expected = (
        torch.cat((latent @ key_weight.transpose(1, 2), rotated.expand(-1, len(key_weight), -1, -1)), -1),
        latent @ value_weight.transpose(1, 2),
    )
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    return all(
        got.shape == wanted.shape and bool((got - wanted).norm() <= tolerance * wanted.norm())
        for got, wanted in zip((key, value), expected, strict=True)
    )
