"""The config of a model out of a GGUF file's metadata, for architectures that are read as they lie.

Source: llama.cpp, conversion/*.py (what each converter writes) and src/llama-model.cpp (what each architecture does).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from offload_moe.errors import CheckpointError

Metadata = Mapping[str, Any]

# Fields of every config: name in the config, key behind the architecture.
_COMMON = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "num_experts_per_tok": "expert_used_count",
}
_OPTIONAL = {
    "intermediate_size": "feed_forward_length",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
DEFAULT_THETA = 10000.0
SIGMOID = 2  # as `expert_gating_func`; 1 is softmax


class Reader:
    """The metadata of one architecture."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self.path, self.metadata = path, metadata
        self.architecture = str(metadata.get("general.architecture", ""))

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str) -> Any:
        """A number that must be there; of a list with one for each layer, the one that all have that have any.

        Raises: CheckpointError naming the key that is missing or of another type.
        """
        value = self.get(key)
        if isinstance(value, list) and len(found := set(value) - {0} or set(value)) == 1:
            (value,) = found
        if isinstance(value, list):
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} differs from layer to layer, unsupported.")
        if type(value) not in (int, float):
            raise CheckpointError(f"{self.path}: its metadata has no usable {self.architecture}.{key}: {value!r}.")
        return value

    @property
    def num_layers(self) -> Any:
        """Without those for multi-token prediction. Raises: as `number`."""
        return self.number("block_count") - (self.get("nextn_predict_layers") or 0)


def config_of(path: Path, metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`config.json` of the model. shapes: of the file's tensors, by name.

    Raises: CheckpointError for an architecture that is not read as it lies, or metadata that is not usable.
    """
    reader = Reader(path, metadata)
    make = CONFIGS.get(reader.architecture)
    if make is None:
        raise CheckpointError(
            f"{path} is a GGUF file of architecture {reader.architecture!r}; {', '.join(CONFIGS)} can be used as they "
            "lie. Use a safetensors version of the model."
        )
    config: dict[str, Any] = {name: reader.number(key) for name, key in _COMMON.items()}
    config |= {name: reader.number(key) for name, key in _OPTIONAL.items() if reader.get(key) is not None}
    config["num_hidden_layers"] = reader.num_layers
    config["vocab_size"] = _vocabulary(path, shapes)
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["dtype"] = "bfloat16"
    config["rope_parameters"] = _rope(reader)
    for name in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    return config | make(reader, shapes)


def _vocabulary(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{path} has no tensor token_embd.weight. Download it again.")
    return shapes["token_embd.weight"][0]


def _rope(reader: Reader) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": reader.get("rope.freq_base") or DEFAULT_THETA}
    kind = reader.get("rope.scaling.type")
    if kind in (None, "none"):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": reader.number("rope.scaling.factor")}
    if kind != "yarn":
        raise CheckpointError(f"{reader.path}: rotary scaling of type {kind!r} is not supported.")
    return rope | {
        "rope_type": "yarn",
        "factor": reader.number("rope.scaling.factor"),
        "original_max_position_embeddings": reader.number("rope.scaling.original_context_length"),
    }


def _mixtral(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    if reader.get("expert_count") is None:
        raise CheckpointError(f"{reader.path} is a model without experts, of architecture llama.")
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": reader.number("expert_count"),
    }


def _qwen2_moe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": reader.number("expert_count"),
        "moe_intermediate_size": shapes["blk.0.ffn_down_exps.weight"][-1],
        "shared_expert_intermediate_size": shapes["blk.0.ffn_down_shexp.weight"][-1],
        "norm_topk_prob": False,
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
    }


def _qwen3_moe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": reader.number("expert_count"),
        "moe_intermediate_size": reader.number("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _qwen3_next(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "norm_topk_prob": True,
        **_beside_delta_rules(reader, shapes),
    }


def _qwen3_5_moe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Texts alone, whose three positions are equal."""
    config = _beside_delta_rules(reader, shapes)
    sections = reader.get("rope.dimension_sections") or [11, 11, 10]
    config["rope_parameters"] |= {"mrope_section": sections[:3], "mrope_interleaved": True}
    return {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"], **config}


def _beside_delta_rules(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    num_layers = reader.num_layers
    is_linear = [f"blk.{block}.ssm_conv1d.weight" in shapes for block in range(num_layers)]
    turned = reader.number("rope.dimension_count") / reader.number("attention.key_length")
    num_values = reader.number("ssm.time_step_rank")
    return {
        "num_experts": reader.number("expert_count"),
        "moe_intermediate_size": reader.number("expert_feed_forward_length"),
        "shared_expert_intermediate_size": reader.number("expert_shared_feed_forward_length"),
        "layer_types": ["linear_attention" if linear else "full_attention" for linear in is_linear],
        "linear_conv_kernel_dim": reader.number("ssm.conv_kernel"),
        "linear_key_head_dim": reader.number("ssm.state_size"),
        "linear_num_key_heads": reader.number("ssm.group_count"),
        "linear_num_value_heads": num_values,
        "linear_value_head_dim": reader.number("ssm.inner_size") // num_values,
        "rope_parameters": _rope(reader) | {"partial_rotary_factor": turned},
    }


def _olmoe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    clip = reader.get("attention.clamp_kqv")
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "num_experts": reader.number("expert_count"),
        "norm_topk_prob": False,
        "clip_qkv": clip or None,
    }


def _deepseek(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """DeepSeek-V2 and V3, and models of their kind. Older files have no gating function: they are V2's."""
    is_v3 = reader.get("expert_gating_func") == SIGMOID
    rotated, key = reader.number("rope.dimension_count"), "_mla" if reader.get("attention.key_length_mla") else ""
    return {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "num_key_value_heads": reader.number("attention.head_count"),
        "head_dim": rotated,
        **_beside_shared_experts(reader),
        "n_group": reader.get("expert_group_count") or (8 if is_v3 else 1),
        "topk_group": reader.get("expert_group_used_count") or (4 if is_v3 else 1),
        "q_lora_rank": reader.get("attention.q_lora_rank"),
        "kv_lora_rank": reader.number("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": reader.number(f"attention.key_length{key}") - rotated,
        "v_head_dim": reader.number(f"attention.value_length{key}"),
        "rope_parameters": _deepseek_rope(reader),
    }


def _beside_shared_experts(reader: Reader) -> dict[str, Any]:
    return {
        "n_routed_experts": reader.number("expert_count"),
        "n_shared_experts": reader.number("expert_shared_count"),
        "moe_intermediate_size": reader.number("expert_feed_forward_length"),
        "first_k_dense_replace": reader.number("leading_dense_block_count"),
        "routed_scaling_factor": reader.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(reader.get("expert_weights_norm")),
    }


def _deepseek_rope(reader: Reader) -> dict[str, Any]:
    rope = _rope(reader)
    if rope["rope_type"] != "yarn":
        return rope
    # The converter writes a tenth of `mscale_all_dim`, which `mscale` equals in every published model.
    scale = 10.0 * reader.number("rope.scaling.yarn_log_multiplier")
    return rope | {"mscale": scale, "mscale_all_dim": scale, "beta_fast": 32, "beta_slow": 1}


def _glm4_moe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    head_dim = reader.number("attention.key_length")
    rope = _rope(reader) | {"partial_rotary_factor": reader.number("rope.dimension_count") / head_dim}
    return {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        **_beside_shared_experts(reader),
        "n_group": reader.get("expert_group_count") or 1,
        "topk_group": reader.get("expert_group_used_count") or 1,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in shapes,
        "rope_parameters": rope,
    }


def _gpt_oss(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    rope = _rope(reader)
    if rope["rope_type"] == "yarn":
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": reader.number("expert_count"),
        "intermediate_size": reader.number("expert_feed_forward_length"),
        "sliding_window": reader.number("attention.sliding_window"),
        "rope_parameters": rope,
    }


def _minimax_m2(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    turned = reader.number("rope.dimension_count") / reader.number("attention.key_length")
    return {
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "num_local_experts": reader.number("expert_count"),
        "intermediate_size": reader.number("expert_feed_forward_length"),
        "rope_parameters": _rope(reader) | {"partial_rotary_factor": turned},
    }


def _dots1(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "model_type": "dots1",
        "architectures": ["Dots1ForCausalLM"],
        **_beside_shared_experts(reader),
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": None,
    }


def _exaone_moe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Layers of the whole context have no rotation."""
    num_layers = reader.num_layers
    pattern = reader.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        pattern = [(layer + 1) % 4 != 0 for layer in range(num_layers)]
    shared = _beside_shared_experts(reader)
    return {
        "model_type": "exaone_moe",
        "architectures": ["ExaoneMoeForCausalLM"],
        **shared,
        "num_experts": shared["n_routed_experts"],
        "num_shared_experts": shared["n_shared_experts"],
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": reader.number("attention.sliding_window"),
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in pattern[:num_layers]],
    }


def _afmoe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """llama.cpp scales every embedding, and gives every fourth layer the whole context."""
    shared = _beside_shared_experts(reader)
    return {
        "model_type": "afmoe",
        "architectures": ["AfmoeForCausalLM"],
        "num_experts": shared["n_routed_experts"],
        "num_shared_experts": shared["n_shared_experts"],
        "moe_intermediate_size": shared["moe_intermediate_size"],
        "num_dense_layers": shared["first_k_dense_replace"],
        "route_scale": shared["routed_scaling_factor"],
        "sliding_window": reader.number("attention.sliding_window"),
        "global_attn_every_n_layers": 4,
        "mup_enabled": True,
    }


def _granite_moe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    shared = shapes.get("blk.0.ffn_gate_shexp.weight")
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
        "num_local_experts": reader.number("expert_count"),
        **{name: reader.number(key) for name, key in scales.items()},
    }


def _hunyuan_moe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The converter puts the scaling of the rotary base into the base."""
    return {
        "model_type": "hunyuan_v1_moe",
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "num_experts": reader.number("expert_count"),
        "moe_topk": reader.number("expert_used_count"),
        "intermediate_size": reader.number("expert_feed_forward_length"),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
    }


def _lfm2_moe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A layer without heads of keys is a short convolution."""
    heads = reader.get("attention.head_count_kv")
    if not isinstance(heads, list):
        heads = [heads] * reader.number("block_count")
    return {
        "model_type": "lfm2_moe",
        "architectures": ["Lfm2MoeForCausalLM"],
        "num_experts": reader.number("expert_count"),
        "moe_intermediate_size": reader.number("expert_feed_forward_length"),
        "num_dense_layers": reader.number("leading_dense_block_count"),
        "norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": reader.number("shortconv.l_cache"),
        "conv_bias": "blk.0.shortconv.conv.bias" in shapes,
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "routed_scaling_factor": reader.get("expert_weights_scale") or 1.0,
    }


def _ernie_moe(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    first, num_layers = reader.number("leading_dense_block_count"), reader.number("block_count")
    width = reader.number("expert_feed_forward_length")
    shared = shapes.get(f"blk.{first}.ffn_gate_shexp.weight", (0,))[0]
    return {
        "model_type": "ernie4_5_moe",
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "moe_num_experts": reader.number("expert_count"),
        "moe_k": reader.number("expert_used_count"),
        "moe_intermediate_size": width,
        "moe_num_shared_experts": shared // width,
        "moe_layer_start_index": first,
        "moe_layer_end_index": num_layers - 1,
        "moe_layer_interval": reader.get("interleave_moe_layer_step") or 1,
        "use_bias": "blk.0.attn_output.bias" in shapes,
    }


# By llama.cpp's names: `llama` is Mixtral here, `deepseek2` any DeepSeek since V2; a dense model is refused later.
CONFIGS: Mapping[str, Callable[[Reader, Mapping[str, tuple[int, ...]]], dict[str, Any]]] = {
    "llama": _mixtral,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "qwen3vlmoe": _qwen3_moe,  # texts alone, whose three positions are equal
    "qwen3next": _qwen3_next,
    "qwen35moe": _qwen3_5_moe,
    "olmoe": _olmoe,
    "deepseek2": _deepseek,
    "glm4moe": _glm4_moe,
    "gpt-oss": _gpt_oss,
    "minimax-m2": _minimax_m2,
    "dots1": _dots1,
    "exaone-moe": _exaone_moe,
    "afmoe": _afmoe,
    "granitemoe": _granite_moe,
    "hunyuan-moe": _hunyuan_moe,
    "ernie4_5-moe": _ernie_moe,
    "lfm2moe": _lfm2_moe,
}
