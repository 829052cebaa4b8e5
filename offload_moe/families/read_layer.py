"""The `LayerSpec` of a decoder layer: its class's declaration, with the settings of this instance."""

from typing import Any

from torch import nn

from offload_moe.families.declared import declared_class, guard_of
from offload_moe.families.layer_classes import NORMS_FROM_ONE, AttentionClass, LayerClass, RouterClass, Setting
from offload_moe.families.layer_spec import (
    AttentionSpec,
    DeltaSpec,
    LatentSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
    QueryScale,
    Rotary,
    RouterSpec,
)

EXPERTS = "experts"
CHUNKED = "chunked_attention"  # of transformers' layer types
ATTENTION = "self_attn"
JOINED = "in_proj_qkvz"
GATED = ("gate_proj", "up_proj", "down_proj")
FUSED = ("input_linear", "input_linear", "output_linear")  # gate rows above up rows


def layer_spec(layer: nn.Module) -> LayerSpec | None:
    """What this layer computes; None where its class is not declared."""
    name = type(layer).__name__
    declared = declared_class(name)
    if declared is None:
        return None
    with guard_of(name):
        return _read(layer, declared)


def embedding_scale(decoder: Any) -> float:
    """What a decoder multiplies its embeddings by; 1 where its layers' class is not declared."""
    name = type(decoder.layers[0]).__name__
    declared = declared_class(name)
    if declared is None:
        return 1.0
    with guard_of(name):
        return _number(decoder, declared.embedding_scale)


def _read(layer: Any, declared: LayerClass) -> LayerSpec:
    before_attention, after_attention, before_mlp, after_mlp = (_norm(layer, path) for path in declared.norms)
    block = getattr(layer, declared.block)
    is_sparse = hasattr(block, EXPERTS)
    delta = _child(layer, declared.delta)
    activation = layer.self_attn.config.hidden_act if delta is None else delta.activation
    shared = _join(declared.block, declared.shared) if declared.shared else declared.shared_beside
    return LayerSpec(
        attention=_attention(layer.self_attn, declared.attention) if delta is None else _delta(delta, declared.delta),
        before_attention=before_attention,
        after_attention=after_attention,
        before_mlp=before_mlp,
        after_mlp=after_mlp,
        residual_scale=_number(layer, declared.residual_scale),
        router=_router(block, declared.block, declared.router) if is_sparse else None,
        experts=_join(declared.block, EXPERTS) if is_sparse else "",
        shared=_mlp(layer, shared, activation, _join(declared.block, declared.shared_gate)) if is_sparse else None,
        dense=None if is_sparse else _mlp(layer, declared.block, activation),
    )


def _router(block: Any, name: str, declared: RouterClass) -> RouterSpec:
    router = getattr(block, declared.path)
    path = _join(name, declared.path)
    groups = (declared.num_groups, declared.num_chosen_groups)
    num_groups, num_chosen_groups = (1, 1) if _is_greedy(router) else (int(_number(router, each)) for each in groups)
    return RouterSpec(
        path=path,
        weight=_join(path, declared.weight),
        bias=_join(path, "bias") if getattr(router, "bias", None) is not None else "",
        top_k=router.top_k,
        scoring=declared.scoring,
        is_normalized=bool(_setting(router, declared.is_normalized)),
        correction=_join(name, declared.correction),
        num_groups=num_groups,
        num_chosen_groups=num_chosen_groups,
        group_score=declared.group_score,
        scale=_number(router, declared.scale),
        jitter=_number(router, declared.jitter),
        scales_inputs=declared.scales_inputs,
    )


def _is_greedy(router: Any) -> bool:
    """DeepSeek-V2's routers have groups only where their method says so."""
    return getattr(router, "topk_method", "") == "greedy"


def _attention(module: Any, declared: AttentionClass) -> AttentionSpec:
    is_local = bool(_setting(module, declared.is_local))
    window = _setting(module, declared.window, is_optional=True)
    kind: Rotary = "pairs" if _setting(module, declared.is_interleaved) else "halves"
    rotary: Rotary = kind if _rotates(module, declared, window, is_local=is_local) else "none"
    norms = [_norm(module, name, ATTENTION) for name in declared.norms]
    latent = _latent(module) if declared.is_latent else None
    clip = _setting(module, declared.clip)
    query = getattr(module, "q_proj", None)
    return AttentionSpec(
        path=ATTENTION,
        num_heads=module.config.num_attention_heads,
        head_dim=module.qk_head_dim if latent else module.head_dim,
        scaling=module.scaling,
        rotary=rotary,
        rotated_dims=module.qk_rope_head_dim if latent else _rotated_dims(module),
        keeps_pairs=declared.keeps_pairs,
        latent=latent,
        norm_span=declared.norm_span if norms[0] is not None else "none",
        query_norm=norms[0],
        key_norm=norms[1],
        is_normed_rotated=declared.is_normed_rotated,
        has_bias=query is not None and query.bias is not None,
        has_output_bias=module.o_proj.bias is not None,
        sliding_window=None if window is None or not is_local else int(window),
        chunk=_chunk(module, declared),
        query_scale=_query_scale(module, declared) if rotary == "none" else None,
        sinks=_join(ATTENTION, declared.sinks),
        clip=None if clip is None else float(clip),
        gate=_join(ATTENTION, declared.gate),
        is_query_gated=declared.is_query_gated,
    )


def _delta(module: Any, path: str) -> AttentionSpec:
    norm = _norm(module, "norm", path)
    assert norm is not None
    return AttentionSpec(
        path=path,
        num_heads=module.num_v_heads,
        head_dim=module.head_k_dim,
        scaling=module.head_k_dim**-0.5,
        rotary="none",
        rotated_dims=0,
        delta=DeltaSpec(
            num_key_heads=module.num_k_heads,
            value_dims=module.head_v_dim,
            num_taps=module.conv_kernel_size,
            norm=norm,
            is_joined=hasattr(module, JOINED),
        ),
    )


def _rotates(module: Any, declared: AttentionClass, window: Setting, *, is_local: bool) -> bool:
    match declared.rotates:
        case "always":
            return True
        case "local layers":
            return is_local
        case "where use_rope says so":
            return bool(module.use_rope)
    return is_local or window is None


def _chunk(module: Any, declared: AttentionClass) -> int | None:
    if declared.chunk is None or module.config.layer_types[module.layer_idx] != CHUNKED:
        return None
    return int(_number(module, declared.chunk))


def _query_scale(module: Any, declared: AttentionClass) -> QueryScale | None:
    if not _setting(module, declared.scales_queries):
        return None
    step, strength = (_number(module, each) for each in declared.query_scale)
    return QueryScale(step=step, strength=strength)


def _latent(module: Any) -> LatentSpec:
    return LatentSpec(
        query_rank=module.q_lora_rank or 0,
        key_value_rank=module.kv_lora_rank,
        unrotated_dims=module.qk_nope_head_dim,
        value_dims=module.v_head_dim,
    )


def _rotated_dims(module: Any) -> int:
    share = (getattr(module.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return int(module.head_dim * share)


def _mlp(layer: Any, path: str, activation: str, scale_gate: str = "") -> MLPSpec | None:
    module = _child(layer, path)
    if module is None:
        return None
    names = GATED if hasattr(module, GATED[0]) else FUSED
    gate, up, down = (_join(path, name) for name in names)
    return MLPSpec(gate=gate, up=up, down=down, activation=activation, scale_gate=scale_gate)


def _norm(module: Any, name: str, below: str = "") -> NormSpec | None:
    norm = _child(module, name)
    if norm is None:
        return None
    spec = norm_spec(norm, _join(below, name) if below else name)
    if spec is None:  # None would say that there is no norm
        raise AttributeError(f"{type(norm).__name__} has neither variance_epsilon nor eps")
    return spec


def norm_spec(norm: Any, path: str = "") -> NormSpec | None:
    """What a norm computes; None where it names no epsilon."""
    epsilons = [getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)]
    if not epsilons:
        return None
    return NormSpec(
        path=path,
        epsilon=float(epsilons[0]),
        is_centered=isinstance(norm, nn.LayerNorm),
        has_weight=hasattr(norm, "weight"),
        is_from_one=type(norm).__name__ in NORMS_FROM_ONE,
    )


def _child(module: Any, path: str) -> Any:
    """None where there is no such child, or where it is None."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    return module if path else None


def _join(path: str, name: str) -> str:
    """The path of a child; none where the name is empty."""
    return f"{path}.{name}" if name else ""


def _setting(module: nn.Module, setting: Setting, *, is_optional: bool = False) -> Setting:
    """Raises: AttributeError where a module lacks what its class's declaration names."""
    if not isinstance(setting, str):
        return setting
    value: Any = module
    for name in setting.split("."):
        value = getattr(value, name, None) if is_optional else getattr(value, name)
    found: Setting = value
    return found


def _number(module: Any, setting: Setting) -> float:
    value = _setting(module, setting)
    assert isinstance(value, int | float), f"{setting} of {type(module).__name__} is {value}"
    return float(value)
