"""Tiny random models as whole GGUF files, metadata and tokenizer included, beside what their weights decode to."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.support.gguf_files import ARCHITECTURES, OF_DELTA_RULES, PERMUTED, as_delta_rule, as_llama_cpp
from tests.support.gguf_records import HALVES

Kind = gguf.GGMLQuantizationType
MERGED = ("Ġt", "he")
FIRST_SPECIAL = 256 + len(MERGED)
VOCABULARY = 272
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": FIRST_SPECIAL,
}
SHARED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "num_hidden_layers": 3,
}
LATENT: dict[str, Any] = SHARED | {
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
DELTA: dict[str, Any] = {
    "num_experts": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [6, 5, 5],
    },
}
GRANITE: dict[str, Any] = {
    "num_local_experts": 4,
    "attention_multiplier": 0.1,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 256, "head_dim": 64, "norm_topk_prob": True},
    "deepseek_v2": LATENT | {"scoring_func": "softmax", "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "deepseek_v3": LATENT | {"q_lora_rank": 256, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "glm4_moe": SHARED
    | {
        "head_dim": 64,
        "attention_bias": True,
        "use_qk_norm": True,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "glm4_moe_lite": LATENT | {"q_lora_rank": 256, "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 64, "sliding_window": 8, "max_position_embeddings": 131072},
    "olmoe": {"num_experts": 4, "num_key_value_heads": 4},
    "minimax_m2": {
        "num_local_experts": 4,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "dots1": SHARED
    | {
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,  # llama.cpp reads no others
        "head_dim": 64,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": None,
    },
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE | {"shared_intermediate_size": 512},
    "exaone_moe": {
        "num_experts": 4,
        "num_shared_experts": 1,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "head_dim": 64,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "afmoe": {
        "num_experts": 4,
        "num_shared_experts": 1,
        "moe_intermediate_size": 256,
        "num_dense_layers": 1,
        "num_hidden_layers": 4,
        "head_dim": 64,
        "sliding_window": 8,
        "route_scale": 1.5,
        "mup_enabled": True,
    },
    "lfm2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
        "tie_word_embeddings": True,
    },
    "qwen3_next": DELTA,
    "qwen3_5_moe_text": DELTA,
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 64},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 256,
        "moe_layer_start_index": 1,
    },
}
# What the middle of a block's codes is, for types with minima: weights are centred with it.
MIDDLES = {"Q4_1": -7.5, "Q5_1": -15.5, "Q4_K": 7.5, "Q5_K": 15.5, "Q2_K": 1.5}
MIXED = {
    "ffn_down_exps": "Q6_K",
    "attn_v": "Q6_K",
    "output": "Q6_K",
    "token_embd": "Q5_K",
    "attn_k_b": "Q8_0",
    "attn_v_b": "Q8_0",
}  # as Q4_K_M mixes


@dataclass(frozen=True, slots=True)
class GgufModel:
    """path: of the file, or of its first part. hf: the model with the decoded weights, in fp32."""

    path: Path
    hf: PreTrainedModel


def write_model(
    folder: Path,
    family: str,
    kind: str = "Q4_K",
    kinds: Mapping[str, str] | None = None,
    tensors_per_file: int = 0,
    *,
    without: str = "",
    is_latent_split: bool = True,
    architecture: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    **settings: Any,
) -> GgufModel:
    """A model of random blocks. kinds: of tensors whose name has this as its last part but one, in place of `kind`.

    without: a tensor that is left out. is_latent_split: see `write_gguf`. architecture: in place of the family's.
    metadata: keys that differ. more: tensors that are no part of the model. settings: of the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(family, **(COMMON | SETTINGS[family] | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[ARCHITECTURES[family]], config.num_hidden_layers)
    named = architecture or ARCHITECTURES[family]
    writer = gguf.GGUFWriter(folder / "model.gguf", named, split_max_tensors=tensors_per_file)
    _add_metadata(writer, config, metadata or {})
    tied = config.tie_word_embeddings
    kept = MIXED if kinds is None else kinds
    for number, (name, value) in enumerate(model.state_dict().items()):
        if tied and name == "lm_head.weight":
            continue
        stored = as_llama_cpp(name, value, config, names, is_latent_split)
        decoded = {}
        for part, rows in stored:
            chosen = _kind_of(part, rows, kind, kept)
            data, decoded[part] = _random(rows, chosen, number)
            if part.endswith("ssm_a"):  # decays
                data, decoded[part] = -data, -decoded[part]
            if part != without:
                writer.add_tensor(part, data, raw_dtype=Kind[chosen])
        value.copy_(_as_transformers(name, decoded, config))
        if family == "qwen3_5_moe_text" and name.endswith("out_proj.weight") and chosen.endswith("_K"):
            value.copy_(value.bfloat16())  # of other columns than its blocks have: read as numbers
    for name, data in (more or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufModel(sorted(folder.glob("*.gguf"))[0], model)


def _kind_of(name: str, rows: Tensor, kind: str, kinds: Mapping[str, str]) -> str:
    if rows.dim() == 1 or name.endswith("bias") or any(word in name for word in ("gate_inp", "conv.conv.", "ssm_conv")):
        return "F32"
    return kinds.get(name.split(".")[-2], kind)


def _random(rows: Tensor, kind: str, seed: int) -> tuple[np.ndarray, Tensor]:
    """The data of a tensor of this shape, and its numbers."""
    generator = np.random.default_rng(seed)
    if kind in ("F32", "F16", "BF16"):
        is_norm = rows.dim() == 1
        values = generator.normal(1.0 if is_norm else 0.0, 0.1 if is_norm else rows.shape[-1] ** -0.5, rows.shape)
        data = gguf.quantize(values.astype(np.float32), Kind[kind])
        return data, torch.from_numpy(gguf.dequantize(data, Kind[kind])).view(rows.shape)
    block, num_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    blocks = generator.integers(0, 256, (rows.numel() // block, num_bytes), dtype=np.uint8)
    scales = generator.uniform(0.5, 1.5, len(blocks))
    factor = 1.0
    for _ in range(2):  # the second time by what the first one gave
        for place, offset in enumerate(HALVES[kind]):
            numbers = scales * factor * (MIDDLES[kind] if place else 1.0)
            blocks[:, offset : offset + 2] = numbers.astype(np.float16)[:, None].view(np.uint8)
        if kind == "MXFP4":
            blocks[:, 0] = 123
        factor *= 1.5 * rows.shape[-1] ** -0.5 / gguf.dequantize(blocks, Kind[kind]).std()
    data = blocks.reshape(*rows.shape[:-1], -1)
    return data, torch.from_numpy(gguf.dequantize(data, Kind[kind])).view(rows.shape)


def _as_transformers(name: str, parts: Mapping[str, Tensor], config: Any) -> Tensor:
    """The inverse of `as_llama_cpp`."""
    values = list(parts.values())
    if ".linear_attn." in name:
        return _as_delta_rule(name, parts, config)
    if config.model_type in OF_DELTA_RULES and name.endswith("norm.weight"):
        return values[0] - 1
    if name.endswith("kv_b_proj.weight") and len(values) == 2:
        keys, latents = values
        whole = torch.cat([keys.transpose(1, 2), latents], dim=1).flatten(0, 1)
        return whole.bfloat16().float()  # as numbers that were quantized are read
    if config.model_type == "gpt_oss" and ".experts." in name:
        joined = torch.stack(values, dim=2).flatten(1, 2) if len(values) == 2 else values[0]
        return joined if name.endswith("_bias") else joined.transpose(1, 2)
    if name.endswith("shared_mlp.input_linear.weight"):
        return torch.cat(values)
    if len(values) == 2:
        return torch.cat(values, dim=1)
    (value,) = values
    if config.model_type in PERMUTED and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        value = value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    if name.endswith(".conv.conv.weight"):
        return value[:, None]
    return value[None] if name.endswith(("shared_expert_gate.weight", "moe_statics.e_score_correction_bias")) else value


def _as_delta_rule(name: str, parts: Mapping[str, Tensor], config: Any) -> Tensor:
    """The inverse of `as_delta_rule`, by where it moves numbers."""
    whole = torch.cat(list(parts.values()))
    if name.endswith("A_log"):
        whole = (-whole).log()
    shape = (len(whole), 1, *whole.shape[1:]) if name.endswith("conv1d.weight") else tuple(whole.shape)
    numbers = torch.arange(1, whole.numel() + 1, dtype=torch.float64).view(shape)
    if name.endswith("A_log"):
        numbers = numbers.log()
    moved = torch.cat([part for _, part in as_delta_rule(name, numbers, config)]).abs().round().long() - 1
    value = torch.empty(whole.numel())
    value[moved.flatten()] = whole.flatten()
    return value.view(shape)


def _add_metadata(writer: gguf.GGUFWriter, config: Any, changes: Mapping[str, Any]) -> None:
    architecture = writer.arch
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", 256),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None) or config.norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_count": num_experts_of(config),
        "expert_used_count": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
    }
    if config.model_type == "qwen3_moe":
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.model_type in PERMUTED:
        keys["rope.dimension_count"] = config.hidden_size // config.num_attention_heads
    if architecture == "deepseek2":
        length = config.qk_nope_head_dim + config.qk_rope_head_dim
        keys |= {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": config.q_lora_rank,
            "attention.kv_lora_rank": config.kv_lora_rank,
            "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": length,
            "attention.value_length_mla": config.v_head_dim,
            "rope.dimension_count": config.qk_rope_head_dim,
            "expert_gating_func": 1 if config.model_type == "deepseek_v2" else 2,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
    if config.model_type == "glm4_moe":
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim // 2,
            "expert_gating_func": 2,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
    if config.model_type == "gpt_oss":
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.sliding_window": config.sliding_window,
            "expert_feed_forward_length": config.intermediate_size,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(config.rope_parameters["factor"]),
            "rope.scaling.original_context_length": config.rope_parameters["original_max_position_embeddings"],
        }
    if config.model_type in ("minimax_m2", "dots1", "hunyuan_v1_moe"):
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "expert_feed_forward_length": config.intermediate_size,
        }
    if config.model_type == "minimax_m2":
        keys |= {"rope.dimension_count": config.head_dim // 2, "expert_gating_func": 2}
    if config.model_type == "dots1":
        keys |= {"expert_gating_func": 2, "expert_weights_norm": config.norm_topk_prob}
    if config.model_type == "hunyuan_v1_moe":
        keys["expert_shared_feed_forward_length"] = config.intermediate_size
    if config.model_type == "granitemoeshared":
        keys["expert_shared_feed_forward_length"] = config.shared_intermediate_size
    if config.model_type == "exaone_moe":
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.num_shared_experts,
            "expert_shared_feed_forward_length": config.moe_intermediate_size * config.num_shared_experts,
            "expert_gating_func": 2,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_weights_scale": config.routed_scaling_factor,
            "leading_dense_block_count": config.first_k_dense_replace,
            "rope.scaling.type": "none",
        }
    if config.model_type == "afmoe":
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.sliding_window": config.sliding_window,
            "rope.dimension_count": config.head_dim,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.num_shared_experts,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": config.route_scale,
            "leading_dense_block_count": config.num_dense_layers,
        }
    if config.model_type.startswith("granitemoe"):
        keys |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if config.model_type in OF_DELTA_RULES:
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim // 2,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
            "full_attention_interval": 2,
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        }
    if config.model_type == "qwen3_5_moe_text":
        keys["rope.dimension_sections"] = [*config.rope_parameters["mrope_section"], 0]
    if config.model_type == "lfm2_moe":
        keys |= {
            "attention.head_count_kv": [config.num_key_value_heads * (kind != "conv") for kind in config.layer_types],
            "expert_feed_forward_length": config.moe_intermediate_size,
            "leading_dense_block_count": config.num_dense_layers,
            "expert_gating_func": 2,
            "shortconv.l_cache": config.conv_L_cache,
        }
    if config.model_type == "ernie4_5_moe":
        keys |= {
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.moe_num_shared_experts,
            "expert_shared_feed_forward_length": config.moe_intermediate_size * config.moe_num_shared_experts,
            "leading_dense_block_count": config.moe_layer_start_index,
            "interleave_moe_layer_step": config.moe_layer_interval,
        }
    if hasattr(config, "n_shared_experts"):
        keys |= {
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.n_shared_experts,
            "leading_dense_block_count": config.first_k_dense_replace,
            "expert_weights_scale": config.routed_scaling_factor,
        }
    if config.model_type in ("qwen2_moe", "qwen3_moe"):
        keys["expert_feed_forward_length"] = config.moe_intermediate_size
    if config.model_type == "qwen2_moe":
        keys["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    tokens = [*bytes_to_unicode().values(), *MERGED, *SPECIAL]
    tokens += [f"<|unused_{n}|>" for n in range(VOCABULARY - len(tokens))]
    whole: dict[str, Any] = {f"{architecture}.{key}": value for key, value in keys.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * FIRST_SPECIAL + [3] * (VOCABULARY - FIRST_SPECIAL),
        "tokenizer.ggml.merges": ["Ġ t", "h e"],
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    for key, value in (whole | dict(changes)).items():
        if value is not None:
            _add(writer, key, value)


def num_experts_of(config: Any) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return int(next(found for name in names if (found := getattr(config, name, None)) is not None))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
