"""The names in transformers of a GGUF file's tensors, for architectures whose weights are known to agree.

Source: gguf-py, gguf/constants.py and tensor_mapping.py; llama.cpp, convert_hf_to_gguf.py.
"""

import re

PERMUTED = ("llama", "granitemoe")  # rows of query and key are in the order of another rotary embedding

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_WHOLE_OF = {"lfm2moe": {"token_embd_norm": "model.embedding_norm", "output_norm": "model.embedding_norm"}}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_IN_BLOCK_OF = {
    "deepseek2": {
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        "exp_probs_b": "mlp.gate.e_score_correction",
        **_SHARED_EXPERTS,
    },
    "glm4moe": {
        "post_attention_norm": "post_attention_layernorm",
        "exp_probs_b": "mlp.gate.e_score_correction",
        **_SHARED_EXPERTS,
    },
    "afmoe": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_mlp_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
        "attn_gate": "self_attn.gate_proj",
        "ffn_gate_inp": "mlp.router.gate",
        "exp_probs_b": "mlp.expert",
        **_SHARED_EXPERTS,
    },
    "exaone-moe": {"exp_probs_b": "mlp.gate.e_score_correction", **_SHARED_EXPERTS},
    "dots1": {"exp_probs_b": "mlp.gate.e_score_correction", **_SHARED_EXPERTS},
    "ernie4_5-moe": {"exp_probs_b": "mlp.gate.moe_statics.e_score_correction", **_SHARED_EXPERTS},
    "minimax-m2": {"exp_probs_b": "mlp.e_score_correction"},
    "granitemoe": {
        "ffn_gate_inp": "block_sparse_moe.router",
        "ffn_gate_up_exps": "block_sparse_moe.experts.gate_up_proj",
        "ffn_down_exps": "block_sparse_moe.experts.down_proj",
        "ffn_gate_shexp": "shared_mlp.input_linear",
        "ffn_down_shexp": "shared_mlp.output_linear",
    },
    "lfm2moe": {
        "attn_norm": "operator_norm",
        "ffn_norm": "ffn_norm",
        "attn_output": "self_attn.out_proj",
        "attn_q_norm": "self_attn.q_layernorm",
        "attn_k_norm": "self_attn.k_layernorm",
        "shortconv.conv": "conv.conv",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
        "ffn_gate": "feed_forward.w1",
        "ffn_up": "feed_forward.w3",
        "ffn_down": "feed_forward.w2",
        "ffn_gate_inp": "feed_forward.gate",
        "ffn_gate_up_exps": "feed_forward.experts.gate_up_proj",
        "ffn_down_exps": "feed_forward.experts.down_proj",
        "exp_probs_b": "feed_forward.expert",
    },
    "hunyuan-moe": {
        "attn_q_norm": "self_attn.query_layernorm",
        "attn_k_norm": "self_attn.key_layernorm",
        "ffn_gate_inp": "mlp.gate.wg",
        "ffn_gate_shexp": "mlp.shared_mlp.gate_proj",
        "ffn_up_shexp": "mlp.shared_mlp.up_proj",
        "ffn_down_shexp": "mlp.shared_mlp.down_proj",
    },
    "qwen3next": {"post_attention_norm": "post_attention_layernorm"},
    "qwen35moe": {"post_attention_norm": "post_attention_layernorm"},
    "gpt-oss": {
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    },
}
_ARCHITECTURE_OF = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "hunyuan_v1_moe": "hunyuan-moe",
    "ernie4_5_moe": "ernie4_5-moe",
    "lfm2_moe": "lfm2moe",
    "granitemoeshared": "granitemoe",
    "exaone_moe": "exaone-moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_5_moe": "qwen35moe",
}
# Of the layer for multi-token prediction, beside what every layer has.
_NEXTN = {"shared_head_norm": "shared_head.norm", "shared_head_head": "shared_head.head"}
_APART = {
    "eh_proj": "fc",
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "shared_head.norm": "norm",
}  # where the checkpoint has that layer as a small model of its own
_UNUSED = re.compile(r"rope_freqs\.weight")
_IN_NEXTN = re.compile(r"blk\.(\d+)\.nextn\.(\w+)\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(\.weight)?")
_BLOCK = re.compile(r"blk\.(\d+)\.([\w.]+)\.(weight|bias)")


def architecture_of(model_type: str) -> str:
    """llama.cpp's name of a model type whose tensors have names of their own; the type itself for any other."""
    return _ARCHITECTURE_OF.get(model_type, model_type)


def transformers_name(name: str, architecture: str) -> str | None:
    """The name in transformers; an unknown name is returned unchanged, and None stands for an unneeded tensor."""
    if _UNUSED.fullmatch(name):
        return None
    if (own := _IN_NEXTN.fullmatch(name)) is not None:
        return f"model.layers.{own[1]}.{_NEXTN.get(own[2], own[2])}.weight"
    stem, _, kind = name.rpartition(".")
    if (whole := (_WHOLE | _WHOLE_OF.get(architecture, {})).get(stem)) is not None:
        return f"{whole}.{kind}"
    match = _BLOCK.fullmatch(name)
    known = _IN_BLOCK | _IN_BLOCK_OF.get(architecture, {})
    if match is None or ("." in match[2] and match[2] not in known):
        return re.sub(r"^blk\.(\d+)\.", r"model.layers.\1.", name)  # possibly of a layer for multi-token prediction
    if match[2] not in known:
        return name
    inside = known[match[2]]
    return f"model.layers.{match[1]}.{inside}{_ending(inside, match[3])}"


def with_mtp_apart(name: str, architecture: str, num_layers: int) -> str:
    """The name of a tensor behind the model's layers as these checkpoints have it; others are returned unchanged."""
    match = _LAYER.fullmatch(name)
    if architecture not in ("qwen35moe", "exaone-moe") or match is None or int(match[1]) < num_layers:
        return name
    inside = _APART.get(match[2]) or f"layers.{int(match[1]) - num_layers}.{match[2]}"
    return f"mtp.{inside}{match[3] or ''}"


def _ending(inside: str, kind: str) -> str:
    """Fused experts, sinks and corrections are parameters themselves, not modules with a weight and a bias."""
    if inside.partition(".")[2].startswith("experts.") or inside.endswith(("score_correction", ".expert")):
        return "_bias" if kind == "bias" else ""
    return "" if inside.endswith("sinks") else f".{kind}"


def fused_experts(name: str, architecture: str) -> tuple[str, str] | None:
    """For the gate half of fused experts: the name of the up half, and of both in transformers."""
    match = re.fullmatch(r"blk\.(\d+)\.ffn_gate_exps\.(weight|bias)", name)
    if match is None:
        return None
    both = transformers_name(f"blk.{match[1]}.ffn_gate_up_exps.{match[2]}", architecture)
    assert both is not None, name
    return f"blk.{match[1]}.ffn_up_exps.{match[2]}", both


def split_latent(name: str) -> tuple[str, str] | None:
    """For the key half of the latent's projection to keys and values: the value half, and the name of both."""
    match = re.fullmatch(r"blk\.(\d+)\.attn_k_b\.weight", name)
    if match is None:
        return None
    return f"blk.{match[1]}.attn_v_b.weight", f"model.layers.{match[1]}.self_attn.kv_b_proj.weight"
