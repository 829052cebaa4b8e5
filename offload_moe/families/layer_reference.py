"""A decoder layer computed from its `LayerSpec` alone, slowly: the meaning of a declaration.

Only weights, and the routed experts with them, come from the module. Tests compare it with transformers' own layer.

Shapes: B batch, T tokens, H hidden, N query heads, M key/value heads, D head dim, R rotated dims, E experts, K top-k.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from offload_moe.families.delta_reference import delta_output
from offload_moe.families.layer_spec import (
    AttentionSpec,
    LatentSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
    QueryScale,
    RouterSpec,
)


def layer_output(layer: nn.Module, spec: LayerSpec, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[B, T, H] -> [B, T, H]`` of whole sequences; cos and sin ``[B, T, R / 2]``."""
    attended = attention_output(layer, spec.attention, _norm(layer, spec.before_attention, x), cos, sin)
    x = x + spec.residual_scale * _norm(layer, spec.after_attention, attended)
    mixed = mlp_output(layer, spec, _norm(layer, spec.before_mlp, x))
    return x + spec.residual_scale * _norm(layer, spec.after_mlp, mixed)


def mlp_output(layer: nn.Module, spec: LayerSpec, x: Tensor) -> Tensor:
    """``[B, T, H] -> [B, T, H]``."""
    if spec.router is None:
        assert spec.dense is not None
        return _mlp(layer, spec.dense, x)
    rows = x.flatten(0, 1)
    weights, ids = route(layer, spec.router, rows)
    experts = _sorted_experts if spec.router.scales_inputs else _experts
    out = experts(layer, spec, rows, ids, weights).view(x.shape)
    return out if spec.shared is None else out + _mlp(layer, spec.shared, x)


def _experts(layer: nn.Module, spec: LayerSpec, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out: Tensor = layer.get_submodule(spec.experts)(rows, ids, weights)
    return out


def _sorted_experts(layer: nn.Module, spec: LayerSpec, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Experts whose inputs are scaled are given rows of all of them, one expert's after the other's."""
    assert spec.router is not None
    num_experts = len(tensor_at(layer, spec.router.weight))
    scales = torch.zeros(num_experts, len(rows)).scatter_(0, ids.T, weights.T)
    out: Tensor = layer.get_submodule(spec.experts)((scales[..., None] * rows).flatten(0, 1))
    return out.view(num_experts, *rows.shape).sum(0)


def route(layer: nn.Module, spec: RouterSpec, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[T, H]`` -> weights and ids ``[T, K]``, in fp32; ids by their scores, the greatest first."""
    bias = tensor_at(layer, spec.bias).float() if spec.bias else None
    logits = functional.linear(rows.float(), tensor_at(layer, spec.weight).float(), bias)
    weights, ids = _sparsemixer(logits, spec) if spec.scoring == "sparsemixer" else _choose(layer, logits, spec)
    return weights * spec.scale, ids


def _choose(layer: nn.Module, logits: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()
    wanted = scores + tensor_at(layer, spec.correction).flatten() if spec.correction else scores
    ids = wanted.masked_fill(~_in_chosen_groups(wanted, spec), -torch.inf).topk(spec.top_k).indices
    weights = scores.gather(-1, ids)
    if spec.is_normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


def _in_chosen_groups(wanted: Tensor, spec: RouterSpec) -> Tensor:
    groups = wanted.view(len(wanted), spec.num_groups, -1)
    best = groups.topk(1 if spec.group_score == "max" else min(2, groups.shape[-1])).values.sum(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(spec.num_chosen_groups).indices, True)
    return chosen[..., None].expand_as(groups).flatten(1)


def _sparsemixer(logits: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """One expert after another, each weighed among the logits near its own."""
    weights, ids, left = [], [], logits
    for _ in range(spec.top_k):
        best, chosen = left.max(-1, keepdim=True)
        is_far = (best - logits) / logits.abs().clamp(min=best) > 2 * spec.jitter
        weights.append(left.masked_fill(is_far, -torch.inf).softmax(-1).gather(-1, chosen))
        ids.append(chosen)
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, -1), torch.cat(ids, -1)


def attention_output(layer: nn.Module, spec: AttentionSpec, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[B, T, H] -> [B, T, H]``: causal, over whole sequences."""
    if spec.delta is not None:
        return delta_output(layer.get_submodule(spec.path), spec, spec.delta, x)
    heads = _latent_heads if spec.latent is not None else _grouped_heads
    query, key, value = heads(layer, spec, x, cos, sin)
    scores = query @ key.transpose(2, 3) * spec.scaling
    scores = scores.masked_fill(~_is_seen(x.shape[1], spec.sliding_window, spec.chunk), -torch.inf)
    if spec.sinks:
        sinks = tensor_at(layer, spec.sinks).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    shares = scores.softmax(-1)[..., : x.shape[1]]
    out = (shares @ value).transpose(1, 2).flatten(2)
    if spec.gate:
        out = out * functional.linear(x, tensor_at(layer, f"{spec.gate}.weight")).sigmoid()
    if spec.is_query_gated:
        out = out * _query_and_gate(_linear(layer, f"{spec.path}.q_proj", x, has_bias=spec.has_bias), spec)[1].sigmoid()
    return _linear(layer, f"{spec.path}.o_proj", out, has_bias=spec.has_output_bias)


def _is_seen(num_tokens: int, window: int | None, chunk: int | None) -> Tensor:
    """``[T, T]``: which keys each query sees."""
    seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    if chunk is not None:
        chunks = torch.arange(num_tokens) // chunk
        seen &= chunks[:, None] == chunks
    return seen if window is None else seen.triu(1 - window)


def _query_and_gate(projected: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``[B, T, N * 2 * D]`` -> queries and gates, each ``[B, T, N * D]``."""
    query, gate = projected.unflatten(-1, (spec.num_heads, 2, -1)).unbind(-2)
    return query.flatten(2), gate.flatten(2)


def _grouped_heads(
    layer: nn.Module, spec: AttentionSpec, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each ``[B, N, T, D]``."""
    query, key, value = (
        _linear(layer, f"{spec.path}.{name}", x, has_bias=spec.has_bias) for name in ("q_proj", "k_proj", "v_proj")
    )
    if spec.is_query_gated:
        query, _ = _query_and_gate(query, spec)
    if spec.norm_span == "all heads":
        query, key = _norm(layer, spec.query_norm, query), _norm(layer, spec.key_norm, key)
    if spec.clip is not None:
        query, key, value = (part.clamp(-spec.clip, spec.clip) for part in (query, key, value))
    query, key, value = (part.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2) for part in (query, key, value))
    is_normed = spec.norm_span == "head"
    if is_normed and not spec.is_normed_rotated:
        query, key = _norm(layer, spec.query_norm, query), _norm(layer, spec.key_norm, key)
    query, key = _rotate(query, spec, cos, sin), _rotate(key, spec, cos, sin)
    if is_normed and spec.is_normed_rotated:
        query, key = _norm(layer, spec.query_norm, query), _norm(layer, spec.key_norm, key)
    if spec.query_scale is not None:
        query = query * _query_scales(spec.query_scale, x.shape[1])[:, None]
    num_shared = spec.num_heads // key.shape[1]
    return query, key.repeat_interleave(num_shared, 1), value.repeat_interleave(num_shared, 1)


def _query_scales(scale: QueryScale, num_tokens: int) -> Tensor:
    """``[T]``."""
    steps = torch.floor((torch.arange(num_tokens) + 1.0) / scale.step)
    return 1 + scale.strength * torch.log1p(steps)


def _latent_heads(
    layer: nn.Module, spec: AttentionSpec, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key ``[B, N, T, D]``, value ``[B, N, T, V]``."""
    latent = spec.latent
    assert latent is not None
    dims = [latent.unrotated_dims, spec.rotated_dims]
    query = _latent_query(layer, spec, latent, x).unflatten(-1, (spec.num_heads, -1)).transpose(1, 2)
    unrotated, rotated = query.split(dims, -1)
    query = torch.cat((unrotated, _rotate(rotated, spec, cos, sin)), -1)
    compressed = _linear(layer, f"{spec.path}.kv_a_proj_with_mqa", x, has_bias=None)
    inner, rotated = compressed.split([latent.key_value_rank, spec.rotated_dims], -1)
    inner = _norm(layer, spec.key_norm, inner)
    expanded = _linear(layer, f"{spec.path}.kv_b_proj", inner, has_bias=False)
    expanded = expanded.unflatten(-1, (spec.num_heads, -1)).transpose(1, 2)
    unrotated, value = expanded.split([latent.unrotated_dims, latent.value_dims], -1)
    shared = _rotate(rotated[:, None], spec, cos, sin).expand(-1, spec.num_heads, -1, -1)
    return query, torch.cat((unrotated, shared), -1), value


def _latent_query(layer: nn.Module, spec: AttentionSpec, latent: LatentSpec, x: Tensor) -> Tensor:
    if not latent.query_rank:
        return _linear(layer, f"{spec.path}.q_proj", x, has_bias=False)
    inner = _norm(layer, spec.query_norm, _linear(layer, f"{spec.path}.q_a_proj", x, has_bias=None))
    return _linear(layer, f"{spec.path}.q_b_proj", inner, has_bias=False)


def _rotate(x: Tensor, spec: AttentionSpec, cos: Tensor, sin: Tensor) -> Tensor:
    """The first rotated dims of each head, by halves or by pairs of neighbours."""
    if spec.rotary == "none":
        return x
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : spec.rotated_dims], x[..., spec.rotated_dims :]
    is_paired = spec.rotary == "pairs"
    first, second = (turned[..., 0::2], turned[..., 1::2]) if is_paired else turned.chunk(2, -1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(parts, -1).flatten(-2) if is_paired else torch.cat(parts, -1)
    return torch.cat((turned, rest), -1)


def _norm(layer: nn.Module, spec: NormSpec | None, x: Tensor) -> Tensor:
    if spec is None:
        return x
    if not spec.has_weight:
        return x * (x.square().mean(-1, keepdim=True) + spec.epsilon).rsqrt()
    weight = tensor_at(layer, f"{spec.path}.weight")
    if spec.is_centered:
        return functional.layer_norm(x, weight.shape, weight, tensor_at(layer, f"{spec.path}.bias"), spec.epsilon)
    return x * (x.square().mean(-1, keepdim=True) + spec.epsilon).rsqrt() * (weight + float(spec.is_from_one))


def _mlp(layer: nn.Module, spec: MLPSpec, x: Tensor) -> Tensor:
    activation = ACT2FN[spec.activation]
    if spec.gate == spec.up:
        gate, up = _linear(layer, spec.gate, x, has_bias=None).chunk(2, -1)
    else:
        gate, up = (_linear(layer, name, x, has_bias=None) for name in (spec.gate, spec.up))
    out = _linear(layer, spec.down, activation(gate) * up, has_bias=None)
    return out * _linear(layer, spec.scale_gate, x, has_bias=False).sigmoid() if spec.scale_gate else out


def _linear(layer: nn.Module, path: str, x: Tensor, *, has_bias: bool | None) -> Tensor:
    """has_bias: None takes one where the module has it."""
    linear = layer.get_submodule(path)
    bias = linear.bias if has_bias is not False else None
    assert has_bias is not True or bias is not None
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return functional.linear(x, weight, bias)  # type: ignore[arg-type]


def tensor_at(layer: nn.Module, path: str) -> Tensor:
    """A tensor of a layer, by its path below it."""
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(layer.get_submodule(owner), name)
    return tensor
