"""A gated delta rule computed from its `DeltaSpec` alone, slowly: the meaning of a declaration.

Shapes: B batch, T tokens, H heads of values, G heads of keys, K and V their dims.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offload_moe.families.layer_spec import AttentionSpec, DeltaSpec

EPSILON = 1e-6  # of the norms of queries and keys


def delta_output(module: nn.Module, spec: AttentionSpec, delta: DeltaSpec, x: Tensor) -> Tensor:
    """``[B, T, hidden] -> [B, T, hidden]``, over whole sequences. Only weights come from the module."""
    parts: Any = module
    mixed, gates, strengths, times = _projected(parts, spec, delta, x)
    convolved = functional.conv1d(
        functional.pad(mixed.transpose(1, 2), (delta.num_taps - 1, 0)),
        parts.conv1d.weight,
        parts.conv1d.bias,
        groups=mixed.shape[-1],
    )
    keys = delta.num_key_heads * spec.head_dim
    query, key, value = functional.silu(convolved).transpose(1, 2).split([keys, keys, gates.shape[-1]], -1)
    shared = spec.num_heads // delta.num_key_heads
    query, key = (_unit(part.unflatten(-1, (-1, spec.head_dim))).repeat_interleave(shared, 2) for part in (query, key))
    fading = (-parts.A_log.exp() * functional.softplus(times + parts.dt_bias)).exp()
    out = _recur(query * spec.scaling, key, value.unflatten(-1, (spec.num_heads, -1)), fading, strengths.sigmoid())
    out = out * (out.square().mean(-1, keepdim=True) + delta.norm.epsilon).rsqrt() * parts.norm.weight
    out = out.flatten(2) * functional.silu(gates)
    return functional.linear(out, parts.out_proj.weight)


def _projected(parts: Any, spec: AttentionSpec, delta: DeltaSpec, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, T, 2 G K + H V]``; gates ``[B, T, H V]``; strengths, times ``[B, T, H]``."""
    if not delta.is_joined:
        return parts.in_proj_qkv(x), parts.in_proj_z(x), parts.in_proj_b(x), parts.in_proj_a(x)
    values = spec.num_heads // delta.num_key_heads * delta.value_dims
    by_heads = parts.in_proj_qkvz(x).unflatten(-1, (delta.num_key_heads, -1))
    query, key, value, gates = by_heads.split([spec.head_dim, spec.head_dim, values, values], -1)
    strengths, times = parts.in_proj_ba(x).unflatten(-1, (delta.num_key_heads, 2, -1)).unbind(-2)
    mixed = torch.cat([part.flatten(2) for part in (query, key, value)], -1)
    return mixed, gates.flatten(2), strengths.flatten(2), times.flatten(2)


def _unit(heads: Tensor) -> Tensor:
    return heads * (heads.square().sum(-1, keepdim=True) + EPSILON).rsqrt()


def _recur(query: Tensor, key: Tensor, value: Tensor, fading: Tensor, strengths: Tensor) -> Tensor:
    """query, key ``[B, T, H, K]``, value ``[B, T, H, V]``, fading and strengths ``[B, T, H]`` -> ``[B, T, H, V]``."""
    state = value.new_zeros(*key[:, 0].shape, value.shape[-1])
    outs = []
    for token in range(value.shape[1]):
        state = state * fading[:, token, :, None, None]
        held = (state * key[:, token, :, :, None]).sum(-2)
        change = (value[:, token] - held) * strengths[:, token, :, None]
        state = state + key[:, token, :, :, None] * change[:, :, None]
        outs.append((state * query[:, token, :, :, None]).sum(-2))
    return torch.stack(outs, 1)
