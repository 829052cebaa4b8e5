"""What the config of each architecture has beyond that of every one.

Source: llama.cpp, conversion/*.py (what each converter writes) and src/llama-model.cpp (what each architecture does).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from offload_moe.checkpoint.gguf_metadata import MOST_HEADS, Metadata
from offload_moe.checkpoint.gguf_rope import deepseek_rope, partly_rotated, rope_of, rotated

SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # as `expert_gating_func`


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. make: what its config has beyond that of every one.

    gates, norms: what the model can compute of `expert_gating_func` and `expert_weights_norm`, where a file says so.
    has_groups: whether experts are chosen by groups. is_partly_rotated: whether `make` reads `rope.dimension_count`;
    others rotate whole heads.
    """

    make: Callable[[Metadata], dict[str, Any]]
    gates: tuple[int, ...] = (SOFTMAX,)
    norms: tuple[bool, ...] = (True,)
    has_groups: bool = False
    is_partly_rotated: bool = False


def _mixtral(found: Metadata) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": found.count("expert_count"),
    }


def _qwen2_moe(found: Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": found.count("expert_count"),
        "moe_intermediate_size": found.shape("blk.0.ffn_down_exps.weight", 3)[-1],
        "shared_expert_intermediate_size": found.shape("blk.0.ffn_down_shexp.weight", 2)[-1],
        "norm_topk_prob": False,
        "qkv_bias": "blk.0.attn_q.bias" in found.shapes,
    }


def _qwen3_moe(found: Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": found.count("expert_count"),
        "moe_intermediate_size": found.count("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _qwen3_next(found: Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "norm_topk_prob": True,
        **_beside_delta_rules(found),
    }


def _qwen3_5_moe(found: Metadata) -> dict[str, Any]:
    """Texts alone, whose three positions are equal."""
    config = _beside_delta_rules(found)
    sections = found.get("rope.dimension_sections") or [11, 11, 10]
    if not (isinstance(sections, list) and all(type(part) is int and 0 <= part <= MOST_HEADS for part in sections)):
        raise found.unusable("rope.dimension_sections", "a list of whole numbers")
    config["rope_parameters"] |= {"mrope_section": sections[:3], "mrope_interleaved": True}
    return {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"], **config}


def _beside_delta_rules(found: Metadata) -> dict[str, Any]:
    is_linear = [f"blk.{block}.ssm_conv1d.weight" in found.shapes for block in range(found.num_layers)]
    num_keys = found.count("ssm.group_count", most=MOST_HEADS)
    num_values = found.count("ssm.time_step_rank", most=MOST_HEADS)
    width = found.count("ssm.inner_size")
    if num_values % num_keys or width % num_values:
        raise found.refused("ssm.time_step_rank", f"is {num_values}, for {num_keys} heads of keys and {width} values")
    return {
        "num_experts": found.count("expert_count"),
        "moe_intermediate_size": found.count("expert_feed_forward_length"),
        "shared_expert_intermediate_size": found.count("expert_shared_feed_forward_length"),
        "layer_types": ["linear_attention" if linear else "full_attention" for linear in is_linear],
        "linear_conv_kernel_dim": found.count("ssm.conv_kernel"),
        "linear_key_head_dim": found.count("ssm.state_size"),
        "linear_num_key_heads": num_keys,
        "linear_num_value_heads": num_values,
        "linear_value_head_dim": width // num_values,
        "rope_parameters": partly_rotated(found),
    }


def _olmoe(found: Metadata) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "num_experts": found.count("expert_count"),
        "norm_topk_prob": False,
        "clip_qkv": found.positive_or_none("attention.clamp_kqv"),
    }


def _deepseek(found: Metadata) -> dict[str, Any]:
    """DeepSeek-V2 and V3, and models of their kind. Older files have no gating function: they are V2's."""
    is_v3 = found.get("expert_gating_func") == SIGMOID
    if not is_v3 and found.flag("expert_weights_norm"):
        raise found.unusable("expert_weights_norm", "False, as DeepSeek-V2 computes,")
    key = "_mla" if found.get("attention.key_length_mla") else ""
    width = found.count(f"attention.key_length{key}", least=2)
    turned = rotated(found, width - 1)
    # Older files of V3 have no groups either; Kimi K2, Moonlight and GLM have other numbers of experts, and one group.
    groups = _groups(found, *((8, 4) if is_v3 and found.count("expert_count") == 256 else (1, 1)))
    return {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "num_key_value_heads": found.count("attention.head_count", most=MOST_HEADS),
        "head_dim": turned,
        **_beside_shared_experts(found),
        **groups,
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if groups["n_group"] > 1 else "greedy",
        "q_lora_rank": found.count("attention.q_lora_rank", 0, least=0) or None,
        "kv_lora_rank": found.count("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": width - turned,
        "v_head_dim": found.count(f"attention.value_length{key}"),
        "rope_parameters": deepseek_rope(found),
    }


def _groups(found: Metadata, num_groups: int, num_used: int) -> dict[str, int]:
    """Groups of experts of which some are used; the numbers are for files without them."""
    experts, chosen = found.count("expert_count"), found.count("expert_used_count")
    num_groups = found.count("expert_group_count", num_groups, least=0, most=experts) or num_groups
    num_used = found.count("expert_group_used_count", num_used, least=0, most=num_groups) or num_used
    if experts % num_groups or num_used > num_groups or chosen > experts // num_groups * num_used:
        what = f"is {num_groups}, of which {num_used} are used, for {chosen} of {experts} experts"
        raise found.refused("expert_group_count", what)
    return {"n_group": num_groups, "topk_group": num_used}


def _beside_shared_experts(found: Metadata) -> dict[str, Any]:
    return {
        "n_routed_experts": found.count("expert_count"),
        "n_shared_experts": found.count("expert_shared_count", least=0),
        "moe_intermediate_size": found.count("expert_feed_forward_length"),
        "first_k_dense_replace": _num_dense(found),
        "routed_scaling_factor": found.positive_or_none("expert_weights_scale") or 1.0,
        "norm_topk_prob": found.flag("expert_weights_norm"),
    }


def _num_dense(found: Metadata) -> int:
    """Layers without experts, which are the first."""
    return found.count("leading_dense_block_count", least=0, most=found.num_layers - 1)


def _glm4_moe(found: Metadata) -> dict[str, Any]:
    return {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        **_beside_shared_experts(found),
        **_groups(found, 1, 1),
        "attention_bias": "blk.0.attn_q.bias" in found.shapes,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in found.shapes,
        "rope_parameters": partly_rotated(found),
    }


def _gpt_oss(found: Metadata) -> dict[str, Any]:
    rope = rope_of(found)
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": found.count("expert_count"),
        "intermediate_size": found.count("expert_feed_forward_length"),
        "sliding_window": found.count("attention.sliding_window"),
        "rope_parameters": rope,
    }


def _minimax_m2(found: Metadata) -> dict[str, Any]:
    return {
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "num_local_experts": found.count("expert_count"),
        "intermediate_size": found.count("expert_feed_forward_length"),
        "rope_parameters": partly_rotated(found),
    }


def _dots1(found: Metadata) -> dict[str, Any]:
    return {
        "model_type": "dots1",
        "architectures": ["Dots1ForCausalLM"],
        **_beside_shared_experts(found),
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": None,
    }


def _exaone_moe(found: Metadata) -> dict[str, Any]:
    """Layers of the whole context have no rotation."""
    pattern = found.per_layer("attention.sliding_window_pattern")
    if pattern is None:
        pattern = [(layer + 1) % 4 != 0 for layer in range(found.num_layers)]
    shared = _beside_shared_experts(found)
    return {
        "model_type": "exaone_moe",
        "architectures": ["ExaoneMoeForCausalLM"],
        **shared,
        "num_experts": shared["n_routed_experts"],
        "num_shared_experts": shared["n_shared_experts"],
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": found.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in pattern],
    }


def _afmoe(found: Metadata) -> dict[str, Any]:
    """llama.cpp scales every embedding, and gives every fourth layer the whole context."""
    shared = _beside_shared_experts(found)
    return {
        "model_type": "afmoe",
        "architectures": ["AfmoeForCausalLM"],
        "num_experts": shared["n_routed_experts"],
        "num_shared_experts": shared["n_shared_experts"],
        "moe_intermediate_size": shared["moe_intermediate_size"],
        "num_dense_layers": shared["first_k_dense_replace"],
        "route_scale": shared["routed_scaling_factor"],
        "sliding_window": found.count("attention.sliding_window"),
        "global_attn_every_n_layers": found.count("attention.sliding_window_pattern", 4),
        "mup_enabled": True,
    }


def _granite_moe(found: Metadata) -> dict[str, Any]:
    shared = found.shapes.get("blk.0.ffn_gate_shexp.weight")
    scales = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    return {
        "model_type": "granitemoe" if shared is None else "granitemoeshared",
        "architectures": ["GraniteMoeForCausalLM" if shared is None else "GraniteMoeSharedForCausalLM"],
        **({} if shared is None else {"shared_intermediate_size": shared[0]}),
        "num_local_experts": found.count("expert_count"),
        **{name: found.positive(key) for name, key in scales.items()},
    }


def _hunyuan_moe(found: Metadata) -> dict[str, Any]:
    """The converter puts the scaling of the rotary base into the base."""
    return {
        "model_type": "hunyuan_v1_moe",
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "num_experts": found.count("expert_count"),
        "moe_topk": found.count("expert_used_count"),
        "intermediate_size": found.count("expert_feed_forward_length"),
        "attention_bias": "blk.0.attn_q.bias" in found.shapes,
    }


def _lfm2_moe(found: Metadata) -> dict[str, Any]:
    """A layer without heads of keys is a short convolution."""
    heads = found.per_layer("attention.head_count_kv") or [True] * found.num_layers
    return {
        "model_type": "lfm2_moe",
        "architectures": ["Lfm2MoeForCausalLM"],
        "num_experts": found.count("expert_count"),
        "moe_intermediate_size": found.count("expert_feed_forward_length"),
        "num_dense_layers": _num_dense(found),
        "norm_eps": found.positive("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": found.count("shortconv.l_cache"),
        "conv_bias": "blk.0.shortconv.conv.bias" in found.shapes,
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "routed_scaling_factor": found.positive_or_none("expert_weights_scale") or 1.0,
    }


def _ernie_moe(found: Metadata) -> dict[str, Any]:
    first, width = _num_dense(found), found.count("expert_feed_forward_length")
    shared = found.shapes.get(f"blk.{first}.ffn_gate_shexp.weight", (0,))[0]
    return {
        "model_type": "ernie4_5_moe",
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "moe_num_experts": found.count("expert_count"),
        "moe_k": found.count("expert_used_count"),
        "moe_intermediate_size": width,
        "moe_num_shared_experts": shared // width,
        "moe_layer_start_index": first,
        "moe_layer_end_index": found.num_layers - 1,
        "moe_layer_interval": found.count("interleave_moe_layer_step", 1),
        "use_bias": "blk.0.attn_output.bias" in found.shapes,
    }


# By llama.cpp's names: `llama` is Mixtral here, `deepseek2` any DeepSeek since V2.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(_mixtral),
    "qwen2moe": Family(_qwen2_moe, norms=(False,)),
    "qwen3moe": Family(_qwen3_moe),
    "qwen3vlmoe": Family(_qwen3_moe),  # texts alone, whose three positions are equal
    "qwen3next": Family(_qwen3_next, is_partly_rotated=True),
    "qwen35moe": Family(_qwen3_5_moe, is_partly_rotated=True),
    "olmoe": Family(_olmoe, norms=(False,)),
    "deepseek2": Family(_deepseek, (SOFTMAX, SIGMOID), (False, True), has_groups=True, is_partly_rotated=True),
    "glm4moe": Family(_glm4_moe, (SIGMOID,), (True, False), has_groups=True, is_partly_rotated=True),
    "gpt-oss": Family(_gpt_oss, (SOFTMAX_OF_CHOSEN,)),
    "minimax-m2": Family(_minimax_m2, (SIGMOID,), is_partly_rotated=True),
    "dots1": Family(_dots1, (SIGMOID,), (True, False)),
    "exaone-moe": Family(_exaone_moe, (SIGMOID,), (True, False)),
    "afmoe": Family(_afmoe, (SIGMOID,)),
    "granitemoe": Family(_granite_moe),
    "hunyuan-moe": Family(_hunyuan_moe),
    "ernie4_5-moe": Family(_ernie_moe),
    "lfm2moe": Family(_lfm2_moe, (SIGMOID,)),
}
