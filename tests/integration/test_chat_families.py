"""The families whose recurrent state the prefix cache continues: several tokens on a state equal one pass over all."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from offload_moe.chat.prefix import CONTINUED_FAMILIES
from offload_moe.families.cache_name import with_cache

COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA_NET = {
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v4": {},
    "granitemoehybrid": {
        "num_hidden_layers": 2,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 16,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
        "mamba_expand": 2,
    },
    "kimi_linear": {
        "num_key_value_heads": 4,
        "num_experts_per_token": 2,
        "linear_attn_config": {"head_dim": 16, "num_heads": 2},
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "nemotron_h": {
        "hybrid_override_pattern": "M*ME",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen3_5_moe_text": DELTA_NET,
    "qwen3_next": DELTA_NET,
}


def test_every_family_is_tried() -> None:
    assert set(FAMILIES) == CONTINUED_FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_is_continued_by_several_tokens_at_once(family: str) -> None:
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1)
    ids = torch.randint(3, 99, (1, 41))
    with torch.no_grad():
        at_once = model(ids, **with_cache(DynamicCache(config=config))).logits[:, -1]
        cache = DynamicCache(config=config)
        model(ids[:, :25], **with_cache(cache))
        continued = model(ids[:, 25:], **with_cache(cache)).logits[:, -1]
        apart = model(ids[:, 25:]).logits[:, -1]
    torch.testing.assert_close(continued, at_once, rtol=0, atol=2e-5)
    # The state matters: without it the answer is another one.
    assert (apart - at_once).abs().max() > 1e-3
