"""Every declared decoder layer computes what its `LayerSpec` says, and no other spec does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_config
from torch import Tensor, nn

from offload_moe.card.model import why_not
from offload_moe.checkpoint.skeleton import auto_class, build_skeleton
from offload_moe.families.layer_classes import LAYERS
from offload_moe.families.layer_reference import layer_output
from offload_moe.families.layer_spec import AttentionSpec, LayerSpec, NormSpec, QueryScale
from offload_moe.families.limits import layer_limits
from offload_moe.families.read_layer import layer_spec

TOLERANCE = 1e-5
NUM_TOKENS = 9
LAYERED: dict[str, Any] = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 3}
SLIDING: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "shared_expert_intermediate_size": 24,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
# A family of each declared class, with settings that use what the class can do.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "AfmoeDecoderLayer": ("afmoe", SLIDING | {"num_dense_layers": 1, "num_hidden_layers": 4, "route_scale": 1.7}),
    "AriaTextDecoderLayer": ("aria_text", {"moe_num_experts": 8, "moe_topk": 3}),
    "DeepseekV2DecoderLayer": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7},
    ),
    "DeepseekV3DecoderLayer": ("deepseek_v3", {"n_group": 4, "topk_group": 2, "attention_bias": True}),
    "Dots1DecoderLayer": ("dots1", SLIDING | {"num_hidden_layers": 4, "n_group": 4, "topk_group": 2}),
    "Ernie4_5_MoeDecoderLayer": ("ernie4_5_moe", {"moe_num_experts": 8, "use_bias": True}),
    "ExaoneMoeDecoderLayer": ("exaone_moe", SLIDING | {"num_hidden_layers": 4, "n_group": 4, "topk_group": 2}),
    "FlexOlmoDecoderLayer": ("flex_olmo", {"norm_topk_prob": True}),
    "Glm4MoeDecoderLayer": ("glm4_moe", {"use_qk_norm": True, "n_group": 4, "topk_group": 2, "attention_bias": True}),
    "Glm4MoeLiteDecoderLayer": ("glm4_moe_lite", {"n_group": 4, "topk_group": 2}),
    "GptOssDecoderLayer": ("gpt_oss", SLIDING | {"num_hidden_layers": 4}),
    "GraniteMoeDecoderLayer": ("granitemoe", {"residual_multiplier": 0.4, "attention_multiplier": 0.3}),
    "GraniteMoeSharedDecoderLayer": ("granitemoeshared", {"residual_multiplier": 0.4, "shared_intermediate_size": 24}),
    "HYV3DecoderLayer": ("hy_v3", {"router_scaling_factor": 1.7}),
    "HunYuanMoEV1DecoderLayer": ("hunyuan_v1_moe", {"moe_topk": 3}),
    "Llama4TextDecoderLayer": (
        "llama4_text",
        {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 0, 0, 1], "moe_layers": [0, 2, 4], "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
        | {"attention_chunk_size": 4, "floor_scale": 3, "attn_scale": 0.7}
        | {"layer_types": [*["chunked_attention"] * 2, "full_attention", "chunked_attention", "full_attention"]},
    ),
    "MiniMaxM2DecoderLayer": ("minimax_m2", {}),
    "MixtralDecoderLayer": ("mixtral", {"sliding_window": 4}),
    "OlmoeDecoderLayer": ("olmoe", {"clip_qkv": 0.6, "norm_topk_prob": False}),
    "PhimoeDecoderLayer": ("phimoe", {"router_jitter_noise": 0.3, "num_experts_per_tok": 2, "attention_bias": True}),
    "Qwen2MoeDecoderLayer": ("qwen2_moe", {"qkv_bias": True, "shared_expert_intermediate_size": 24}),
    "Qwen3MoeDecoderLayer": ("qwen3_moe", {"norm_topk_prob": True, "attention_bias": True}),
    "Qwen3NextDecoderLayer": ("qwen3_next", DELTA | {"norm_topk_prob": True, "attention_bias": True}),
    "Qwen3VLMoeTextDecoderLayer": ("qwen3_vl_moe", {}),
    "Qwen3_5MoeDecoderLayer": ("qwen3_5_moe_text", DELTA),
    "SolarOpenDecoderLayer": ("solar_open", {"n_group": 4, "topk_group": 2}),
}


@dataclass(frozen=True)
class Seen:
    """A layer of a model, what it was given, and what it gave."""

    layer: nn.Module
    spec: LayerSpec
    given: Tensor
    cos: Tensor
    sin: Tensor
    result: Tensor

    def error(self, spec: LayerSpec) -> float:
        """Relative distance of what a spec computes."""
        with torch.no_grad():
            half = spec.attention.rotated_dims // 2
            got = layer_output(self.layer, spec, self.given, self.cos[..., :half], self.sin[..., :half])
        return float((got - self.result).norm() / self.result.norm())


def usual_model(class_name: str) -> Any:
    """Nothing is computed with it: it has no weights."""
    config = tiny_config(SETTINGS[class_name][0])
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def random_model(class_name: str) -> Any:
    family, settings = SETTINGS[class_name]
    is_nested = family == "qwen3_vl_moe"  # its language model has a config of its own
    config = tiny_config(family, **({} if is_nested else LAYERED | settings))
    torch.manual_seed(1)
    model = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.normal_(1.0 if "norm" in name and "bias" not in name else 0.0, 0.3)
    return model


@cache
def seen_layers(class_name: str) -> list[Seen]:
    """Every layer of that class, as one forward of its model passes through it."""
    model, calls = random_model(class_name), []

    def watch(layer: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        calls.append((layer, hidden, kwargs["position_embeddings"], result[0] if isinstance(result, tuple) else result))

    for module in model.modules():
        if type(module).__name__ == class_name:
            module.register_forward_hook(watch, with_kwargs=True)
    ids = torch.randint(3, 60, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return [seen_layer(*call) for call in calls]


def seen_layer(layer: nn.Module, given: Tensor, embeddings: Any, result: Tensor) -> Seen:
    spec = layer_spec(layer)
    assert spec is not None
    cos, sin = (embeddings.real, embeddings.imag) if isinstance(embeddings, Tensor) else embeddings
    return Seen(layer, spec, given, cos, sin, result)


def test_every_declared_class_is_compared() -> None:
    assert set(SETTINGS) == set(LAYERS)


@pytest.mark.parametrize("class_name", sorted(LAYERS))
def test_a_declared_layer_computes_what_its_spec_says(class_name: str) -> None:
    layers = seen_layers(class_name)
    assert len(layers) >= 3
    for seen in layers:
        assert seen.result.norm() > 1
        assert seen.error(seen.spec) < TOLERANCE


def test_a_class_that_is_not_declared_has_no_spec() -> None:
    assert layer_spec(nn.Linear(2, 2)) is None


def test_a_declared_setting_that_a_module_lacks_is_an_error() -> None:
    """A newer transformers may rename it; a default in its place would be a guess."""
    layer: Any = random_model("SolarOpenDecoderLayer").model.layers[0]
    del layer.mlp.gate.routed_scaling_factor
    with pytest.raises(AttributeError, match="routed_scaling_factor"):
        layer_spec(layer)


def test_a_norm_without_an_epsilon_is_no_missing_norm() -> None:
    layer: Any = random_model("SolarOpenDecoderLayer").model.layers[0]
    del layer.input_layernorm.variance_epsilon
    with pytest.raises(AttributeError, match="has neither variance_epsilon nor eps"):
        layer_spec(layer)


@pytest.mark.parametrize("class_name", sorted(LAYERS))
def test_what_the_kernels_compute_of_a_class_follows_from_its_usual_spec(class_name: str) -> None:
    """With the family's own settings, not those that the comparisons above use."""
    specs = [layer_spec(layer) for layer in usual_model(class_name).modules() if type(layer).__name__ == class_name]
    sparse = [spec for spec in specs if spec is not None and spec.router is not None]
    assert sparse
    expected = "no" if any(layer_limits(spec) for spec in sparse) else "yes"
    assert LAYERS[class_name].fast_path == expected


@pytest.mark.parametrize(
    ("family", "changes", "reasons"),
    [
        ("qwen3_next", {}, []),
        ("qwen3_next", {"linear_key_head_dim": 8}, ["a delta rule over heads of 8 dims"]),
        ("hunyuan_v1_moe", {}, []),
        ("llama4_text", {"no_rope_layers": [0, 0, 0]}, []),
        ("phimoe", {}, []),
        ("qwen3_moe", {}, []),
    ],
)
def test_the_device_pass_refuses_what_it_has_no_kernel_for(
    family: str, changes: dict[str, Any], reasons: list[str]
) -> None:
    why = why_not(build_skeleton(tiny_config(family, **changes)))
    assert all(reason in why for reason in reasons)
    assert bool(why) == bool(reasons)


def norm_mutants(spec: LayerSpec) -> Iterator[LayerSpec]:
    for name in ("before_attention", "after_attention", "before_mlp", "after_mlp"):
        norm: NormSpec | None = getattr(spec, name)
        if norm is None:
            yield replace(spec, **{name: spec.before_mlp or spec.after_mlp})
        else:
            yield replace(spec, **{name: None})
            yield replace(spec, **{name: replace(norm, epsilon=norm.epsilon + 0.3)})
            if not norm.is_centered:
                yield replace(spec, **{name: replace(norm, is_from_one=not norm.is_from_one)})
                yield replace(spec, **{name: replace(norm, path=other_norm(spec, norm))})


def other_norm(spec: LayerSpec, norm: NormSpec) -> str:
    norms = (spec.before_attention, spec.after_attention, spec.before_mlp, spec.after_mlp)
    return next(each.path for each in norms if each is not None and each.path != norm.path)


def router_mutants(spec: LayerSpec) -> Iterator[LayerSpec]:
    router = spec.router
    if router is None:
        return
    is_scaled_anew = spec.after_mlp is not None and spec.shared is None  # by the norm behind it
    changes: list[dict[str, Any]] = [{"top_k": router.top_k - 1}]
    changes += [] if is_scaled_anew else [{"scale": router.scale * 1.1}]
    changes += [{"scoring": "sigmoid" if router.scoring == "softmax" else "softmax"}]
    if router.scoring == "sparsemixer":
        changes += [{"jitter": router.jitter / 3}]
    elif not is_scaled_anew:
        changes += [{"is_normalized": not router.is_normalized}]
    if router.num_groups > 1:
        changes += [
            {"num_chosen_groups": 1},
            {"group_score": "max" if router.group_score == "best two" else "best two"},
        ]
    changes += [{name: ""} for name in ("bias", "correction") if getattr(router, name)]
    yield from (replace(spec, router=replace(router, **change)) for change in changes)


def attention_mutants(spec: LayerSpec) -> Iterator[LayerSpec]:
    attention = spec.attention
    if attention.delta is not None:
        yield from delta_mutants(spec)
        return
    changes: list[dict[str, Any]] = [{"scaling": attention.scaling * 1.1}]
    changes += [{"rotary": kind} for kind in ("halves", "pairs", "none") if kind != attention.rotary]
    changes += [{"sliding_window": (attention.sliding_window or attention.chunk or NUM_TOKENS) - 1}]
    changes += [{"chunk": (attention.chunk or NUM_TOKENS) - 1}]
    if attention.latent is None:
        changes += [{"query_scale": other_scale(attention)}]
    norm = attention.query_norm if attention.norm_span != "none" else None
    if norm is not None:
        changes += [{"norm_span": "none"}, {"query_norm": replace(norm, epsilon=norm.epsilon + 0.3)}]
    if norm is not None and norm.has_weight:
        changes += [{"query_norm": attention.key_norm}, {"query_norm": replace(norm, is_from_one=not norm.is_from_one)}]
    if norm is not None and norm.has_weight and attention.norm_span == "head" and attention.rotary != "none":
        changes += [{"is_normed_rotated": not attention.is_normed_rotated}]
    changes += [{name: ""} for name in ("sinks", "gate") if getattr(attention, name)]
    changes += [{name: None} for name in ("clip",) if getattr(attention, name)]
    changes += [{name: False} for name in ("has_bias", "has_output_bias") if getattr(attention, name)]
    if attention.latent is None and attention.rotary != "none":
        changes += [{"rotated_dims": attention.rotated_dims // 2}]
    same_sizes = norm is None or attention.norm_span == "head"
    for change in changes:
        if same_sizes or change.get("query_norm") != attention.key_norm:
            yield replace(spec, attention=replace(attention, **change))


def delta_mutants(spec: LayerSpec) -> Iterator[LayerSpec]:
    """The scaling of queries is none: the norm behind the rule takes it out again."""
    attention, delta = spec.attention, spec.attention.delta
    assert delta is not None
    norm = replace(delta.norm, epsilon=delta.norm.epsilon + 0.3)
    yield replace(spec, attention=replace(attention, delta=replace(delta, norm=norm)))


def other_scale(attention: AttentionSpec) -> QueryScale:
    scale = attention.query_scale or QueryScale(step=3.0, strength=0.2)
    return replace(scale, strength=scale.strength * 1.5)


def mlp_mutants(spec: LayerSpec) -> Iterator[LayerSpec]:
    yield replace(spec, residual_scale=spec.residual_scale * 1.1)
    if spec.shared is not None:
        yield replace(spec, shared=None)
        yield replace(spec, shared=replace(spec.shared, activation="relu"))
        if spec.shared.scale_gate:
            yield replace(spec, shared=replace(spec.shared, scale_gate=""))
    if spec.dense is not None:
        yield replace(spec, dense=replace(spec.dense, activation="relu"))


MUTANTS: list[Callable[[LayerSpec], Iterator[LayerSpec]]] = [
    norm_mutants,
    router_mutants,
    attention_mutants,
    mlp_mutants,
]


@pytest.mark.parametrize("class_name", sorted(LAYERS))
@pytest.mark.parametrize("mutants", MUTANTS, ids=lambda mutants: mutants.__name__)
def test_no_other_spec_gives_the_layers_results(
    class_name: str, mutants: Callable[[LayerSpec], Iterator[LayerSpec]]
) -> None:
    layers = seen_layers(class_name)
    num_tried = 0
    for spec in {seen.spec for seen in layers}:
        alike = [seen for seen in layers if seen.spec == spec]
        for mutant in mutants(spec):
            assert max(seen.error(mutant) for seen in alike) > 10 * TOLERANCE, mutant
            num_tried += 1
    assert num_tried
