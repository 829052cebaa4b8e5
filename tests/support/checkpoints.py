"""Tiny checkpoints of many families on disk, as `save_pretrained` writes them: in the layout of the hub."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from offload_moe.checkpoint.skeleton import auto_class

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK: dict[str, Any] = {
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_heads": 4,
    "num_attention_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
ERNIE_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "moe_num_experts": 4,
    "moe_intermediate_size": [24, 12],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
AUDIO: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "output_dim": 32,
    "downsample_hidden_size": 8,
    "max_source_positions": 64,
}
FOUR_LAYERS: dict[str, Any] = {"num_hidden_layers": 4}  # where only every fourth one has a cache of keys
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
SPARSE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
HY_TEXT: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
SAM: dict[str, Any] = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "window_size": 2,
    "mlp_dim": 32,
    "downsample_channels": [8, 8],
    "global_attn_indexes": [0],
}
OCR: dict[str, Any] = {
    "text_config": COMMON | {"num_key_value_heads": 4} | SPARSE,
    "vision_config": {"sam_config": SAM, "encoder_config": COMMON | {"image_size": 32, "patch_size": 16}},
}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "decoder_start_token_id": 0,
}
WITH_VISION: dict[str, Any] = {"text_config": COMMON | DEEPSEEK, "vision_config": VISION}

# What COMMON does not say; the families of issue 2 first.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": {},
    "granitemoe": {},
    "olmoe": {},
    "afmoe": {},
    "aria_text": {},
    "axk1": DEEPSEEK,
    "axk2": DEEPSEEK,
    "bailing_hybrid": DEEPSEEK | HYBRID,
    "beam": DEEPSEEK | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "cohere2_moe": {},
    "deepseek_v2": DEEPSEEK | {"n_group": 1, "topk_method": "greedy"},
    "deepseek_v32": DEEPSEEK,
    "deepseek_v4": {},
    "dots1": DEEPSEEK,
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2, "vocab_size_per_layer_input": 64},
    "glm4_moe": DEEPSEEK,
    "glm4_moe_lite": DEEPSEEK,
    "glm_moe_dsa": DEEPSEEK,
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2_text": {},
    "inkling_text": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": DEEPSEEK | HYBRID,
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "nemotron_h": {},
    "phimoe": {},
    "qwen3_5_moe_text": FOUR_LAYERS,
    "qwen3_next": FOUR_LAYERS,
    "qwen4_exp_text": FOUR_LAYERS
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
    | {"indexer_compress_ratio": 2},
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1},
    "glm4v_moe": {
        "text_config": COMMON | DEEPSEEK | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
        "vision_config": VISION,
    },
    "mistral_large4": WITH_VISION,
    "qwen3_5_moe": {"text_config": COMMON | FOUR_LAYERS, "vision_config": VISION},
    "qwen3_vl_moe": WITH_VISION,
    "deepseek_ocr2": OCR,
    "diffusion_gemma": {"text_config": COMMON | {"top_k_experts": 2}, "vision_config": VISION},
    "glm5_next": {"text_config": COMMON | DEEPSEEK | FOUR_LAYERS | {"qk_rope_head_dim": 0}, "vision_config": VISION},
    "mistral4": DEEPSEEK,
    "muse_spark": {
        "text_config": COMMON | {"moe_hidden_size": 24},
        "vision_config": VISION | {"pos_emb_height": 4, "pos_emb_width": 4},
        "audio_config": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_hidden_size": 32},
    },
    "qwen3_omni_moe_thinker": {"text_config": COMMON, "vision_config": VISION, "audio_config": AUDIO},
    "unlimited_ocr": OCR,
    # Outside transformers' registry, see offload_moe.families.
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {"kv_channels": 8, "num_attention_heads": 4},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 40},
    "llama4": {
        "text_config": COMMON | {"num_experts_per_tok": 1, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2},
        "vision_config": VISION,
    },
    "longcat_flash": DEEPSEEK
    | {
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "num_hidden_layers": 4,
        "zero_expert_num": 2,
        "moe_topk": 3,
    },
    "nllb-moe": SEQ2SEQ | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "moe_token_dropout": 0.2},
    "step3p7": {
        "text_config": COMMON
        | {"share_expert_dim": 24, "num_sliding_attention_heads": 4, "sliding_window": 16, "swiglu_limits": [0, 0.5, 0]}
        | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
        "vision_config": VISION,
    },
    "switch_transformers": SEQ2SEQ | {"expert_capacity": 2},
    # Text and vision experts of different widths share one module list.
    "ernie4_5_vl_moe": {"text_config": COMMON | ERNIE_TEXT, "vision_config": VISION},
}
# Of transformers 5.24 on. test_catalog.py fails where one of them is there and missing here.
NEWER: dict[str, dict[str, Any]] = {
    "hy_v4_vl": {"text_config": COMMON | DEEPSEEK | HY_TEXT, "vision_config": VISION | {"spatial_merge_size": 1}},
    "lara_mini": {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
}
FAMILIES |= {family: settings for family, settings in NEWER.items() if family in CONFIG_MAPPING}
KEPT = ("inv_freq", "balancing_biases")  # computed, or set anew by transformers after loading
FEW = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "olmoe")


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    settings = FAMILIES[family]
    return AutoConfig.for_model(family, **(settings if "text_config" in settings else COMMON | settings) | changes)


def write_checkpoint(
    folder: Path,
    family: str = "qwen3_moe",
    shard_size: str = "40KB",
    dtype: torch.dtype = torch.bfloat16,
    **changes: object,
) -> PreTrainedModel:
    """Write a random model of that family; every weight differs from every other."""
    config = tiny_config(family, **changes)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.endswith(KEPT):
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def spread(folder: Path, per_shard: int) -> None:
    """Write a checkpoint anew in many shards, an expert's matrices now and then in two."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    names = sorted(tensors, key=dot_natural_key)
    weight_map = {name: f"model-{index // per_shard:05}.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
