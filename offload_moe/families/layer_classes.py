"""The decoder layers of transformers that are declared, by class name: data only.

A setting is a value, or the name of an attribute where the value is: of the module that the declaration is about, or of
its config (``"config.name"``). Tests compare every class here with what its module computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from offload_moe.families.layer_spec import GroupScore, NormSpan, Scoring

Setting = str | bool | float | None
FastPath = Literal["yes", "no"]
Rotates = Literal["always", "local layers", "local layers, or all where there is no window", "where use_rope says so"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterClass:
    """The router of a declared layer class. path, weight, correction: below the MoE block."""

    path: str = "gate"
    weight: str = "weight"
    scoring: Scoring = "softmax"
    is_normalized: Setting = "norm_topk_prob"
    correction: str = ""
    num_groups: Setting = 1
    num_chosen_groups: Setting = 1
    group_score: GroupScore = "best two"
    scale: Setting = 1.0
    jitter: Setting = 0.0
    scales_inputs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionClass:
    """The attention of a declared layer class. norms: children that norm queries and keys, where an instance has them.
    keeps_pairs: see `AttentionSpec`.

    window: None or a number. is_local: whether it counts for this layer. chunk: None or a number, which counts for
    layers of the type "chunked_attention". query_scale: step and strength, where scales_queries says so and the layer
    does not rotate.
    """

    is_latent: bool = False
    is_interleaved: Setting = False
    keeps_pairs: bool = False
    norm_span: NormSpan = "none"
    norms: tuple[str, str] = ("q_norm", "k_norm")
    is_normed_rotated: bool = False
    window: Setting = None
    is_local: Setting = True
    chunk: Setting = None
    scales_queries: Setting = False
    query_scale: tuple[Setting, Setting] = (1.0, 0.0)
    rotates: Rotates = "always"
    sinks: str = ""
    clip: Setting = None
    gate: str = ""
    is_query_gated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerClass:
    """A declared layer class. norms: before and after attention, before and after the MLP.

    block: the child that is the MLP or the MoE block.
    shared, shared_gate: children of the block; shared_beside: a child of the layer instead. embedding_scale: a setting
    of the decoder, which multiplies its embeddings by it before the first layer. fast_path: whether
    native decode kernels compute all of it with the family's usual settings, or its experts only.
    delta: a child with a gated delta rule, which some instances have in place of attention.
    """

    router: RouterClass
    attention: AttentionClass = AttentionClass()
    delta: str = ""
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    block: str = "mlp"
    shared: str = ""
    shared_gate: str = ""
    shared_beside: str = ""
    residual_scale: Setting = 1.0
    embedding_scale: Setting = 1.0
    fast_path: FastPath = "yes"


SOFTMAX = RouterClass()
OF_CHOSEN = RouterClass(is_normalized=True)
DEEPSEEK = RouterClass(
    scoring="sigmoid",
    correction="gate.e_score_correction_bias",
    num_groups="num_group",
    num_chosen_groups="topk_group",
    scale="routed_scaling_factor",
)
DEEPSEEK_V2 = RouterClass(
    is_normalized=False,
    num_groups="num_group",
    num_chosen_groups="topk_group",
    group_score="max",
    scale="routed_scaling_factor",
)
CORRECTED = RouterClass(scoring="sigmoid", is_normalized=True, correction="e_score_correction_bias")

NORMED_HEADS = AttentionClass(norm_span="head")
NORMED_ROWS = AttentionClass(norm_span="all heads")
LATENT = AttentionClass(
    is_latent=True, is_interleaved="config.rope_interleave", norms=("q_a_layernorm", "kv_a_layernorm")
)

GRANITE = LayerClass(
    router=replace(OF_CHOSEN, path="router"),
    block="block_sparse_moe",
    residual_scale="residual_multiplier",
    embedding_scale="embedding_multiplier",
)
WITH_SHARED = LayerClass(router=DEEPSEEK, shared="shared_experts")
QWEN3_NEXT = LayerClass(
    router=SOFTMAX,
    attention=replace(NORMED_HEADS, is_query_gated=True),
    delta="linear_attn",
    shared="shared_expert",
    shared_gate="shared_expert_gate",
)
NORMS_FROM_ONE = frozenset({"Qwen3NextRMSNorm", "Qwen3_5MoeRMSNorm"})  # classes whose weights are added to one

LAYERS: Mapping[str, LayerClass] = {
    "AfmoeDecoderLayer": LayerClass(
        router=RouterClass(
            path="router",
            weight="gate.weight",
            scoring="sigmoid",
            is_normalized=True,
            correction="expert_bias",
            scale="route_scale",
        ),
        attention=AttentionClass(
            norm_span="head",
            window="sliding_window",
            is_local="is_local_attention",
            rotates="local layers",
            gate="gate_proj",
        ),
        norms=("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
        shared="shared_experts",
        fast_path="no",
    ),
    "AriaTextDecoderLayer": LayerClass(router=replace(OF_CHOSEN, path="router"), shared="shared_experts"),
    "DeepseekV2DecoderLayer": LayerClass(
        router=DEEPSEEK_V2,
        attention=replace(LATENT, is_interleaved=True, keeps_pairs=True),
        shared="shared_experts",
    ),
    "DeepseekV3DecoderLayer": replace(WITH_SHARED, attention=LATENT),
    "Dots1DecoderLayer": replace(WITH_SHARED, attention=replace(NORMED_HEADS, window="sliding_window")),
    "Ernie4_5_MoeDecoderLayer": LayerClass(
        router=RouterClass(is_normalized=True, correction="gate.moe_statics.e_score_correction_bias"),
        attention=AttentionClass(is_interleaved=True, keeps_pairs=True),
        shared="shared_experts",
    ),
    "ExaoneMoeDecoderLayer": replace(
        WITH_SHARED,
        attention=AttentionClass(
            norm_span="head",
            window="sliding_window",
            is_local="is_sliding",
            rotates="local layers, or all where there is no window",
        ),
    ),
    "FlexOlmoDecoderLayer": LayerClass(
        router=SOFTMAX,
        attention=NORMED_ROWS,
        norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
        fast_path="no",
    ),
    "Glm4MoeDecoderLayer": replace(WITH_SHARED, attention=NORMED_HEADS),
    "Glm4MoeLiteDecoderLayer": replace(WITH_SHARED, attention=LATENT),
    "GptOssDecoderLayer": LayerClass(
        router=replace(OF_CHOSEN, path="router"),
        attention=AttentionClass(window="sliding_window", sinks="sinks"),
    ),
    "GraniteMoeDecoderLayer": GRANITE,
    "GraniteMoeSharedDecoderLayer": replace(GRANITE, shared_beside="shared_mlp"),
    "HYV3DecoderLayer": LayerClass(
        router=replace(CORRECTED, scale="router_scaling_factor"),
        attention=NORMED_HEADS,
        shared="shared_experts",
    ),
    "HunYuanMoEV1DecoderLayer": LayerClass(
        router=replace(OF_CHOSEN, weight="wg.weight"),
        attention=AttentionClass(norm_span="head", norms=("query_layernorm", "key_layernorm"), is_normed_rotated=True),
        shared="shared_mlp",
    ),
    "Llama4TextDecoderLayer": LayerClass(
        router=RouterClass(path="router", scoring="sigmoid", is_normalized=False, scales_inputs=True),
        attention=AttentionClass(
            is_interleaved=True,
            keeps_pairs=True,
            norm_span="head",
            norms=("qk_norm", "qk_norm"),
            is_normed_rotated=True,
            chunk="config.attention_chunk_size",
            scales_queries="attn_temperature_tuning",
            query_scale=("floor_scale", "attn_scale"),
            rotates="where use_rope says so",
        ),
        block="feed_forward",
        shared="shared_expert",
    ),
    "MiniMaxM2DecoderLayer": LayerClass(router=CORRECTED, attention=NORMED_ROWS),
    "MixtralDecoderLayer": LayerClass(router=OF_CHOSEN, attention=AttentionClass(window="config.sliding_window")),
    "OlmoeDecoderLayer": LayerClass(router=SOFTMAX, attention=replace(NORMED_ROWS, clip="config.clip_qkv")),
    "PhimoeDecoderLayer": LayerClass(
        router=RouterClass(path="router", scoring="sparsemixer", is_normalized=False, jitter="router_jitter_noise"),
        attention=AttentionClass(window="config.sliding_window"),
    ),
    "Qwen2MoeDecoderLayer": LayerClass(
        router=SOFTMAX,
        attention=AttentionClass(window="sliding_window"),
        shared="shared_expert",
        shared_gate="shared_expert_gate",
    ),
    "Qwen3MoeDecoderLayer": LayerClass(router=SOFTMAX, attention=replace(NORMED_HEADS, window="sliding_window")),
    "Qwen3NextDecoderLayer": QWEN3_NEXT,
    "Qwen3VLMoeTextDecoderLayer": LayerClass(router=OF_CHOSEN, attention=NORMED_HEADS),
    "Qwen3_5MoeDecoderLayer": replace(QWEN3_NEXT, router=OF_CHOSEN),
    "SolarOpenDecoderLayer": WITH_SHARED,
}
