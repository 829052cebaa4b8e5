"""Metadata of GGUF files by strangers: numbers that no model can have are refused by key."""

from pathlib import Path
from typing import Any

import pytest

from offload_moe.checkpoint.gguf_config import config_of
from offload_moe.checkpoint.gguf_header import Unread
from offload_moe.errors import CheckpointError

COMMON = {
    "block_count": 4,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "expert_count": 8,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
}
SHARED = {
    "attention.key_length": 16,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
    "leading_dense_block_count": 1,
    "attention.sliding_window": 8,
    "expert_gating_func": 2,
}
OF: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3moe": {"attention.key_length": 16},
    "glm4moe": SHARED | {"rope.dimension_count": 8},
    "exaone-moe": SHARED,
    "afmoe": SHARED,
    "lfm2moe": {"attention.head_count_kv": [0, 2, 0, 2], "leading_dense_block_count": 1, "shortconv.l_cache": 3},
    "olmoe": {},
    "deepseek2": SHARED
    | {
        "rope.dimension_count": 8,
        "attention.kv_lora_rank": 32,
        "attention.key_length_mla": 24,
        "attention.value_length_mla": 16,
        "expert_group_count": 2,
        "expert_group_used_count": 1,
    },
    "qwen35moe": {
        "attention.key_length": 16,
        "rope.dimension_count": 8,
        "expert_shared_feed_forward_length": 32,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 8,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 32,
    },
}
SHAPES: dict[str, tuple[int, ...]] = {f"blk.{layer}.attn_norm.weight": (64,) for layer in range(4)}
TOKENS = {"token_embd.weight": (100, 64)}


def config(architecture: str, shapes: dict[str, tuple[int, ...]] | None = None, **changes: Any) -> dict[str, Any]:
    keys = COMMON | OF[architecture] | changes
    values = {"general.architecture": architecture} | {
        key if key.startswith("tokenizer.") else f"{architecture}.{key}": value for key, value in keys.items()
    }
    return config_of(Path("a.gguf"), values, SHAPES | TOKENS if shapes is None else shapes)


@pytest.mark.parametrize("architecture", OF)
def test_usable(architecture: str) -> None:
    found = config(architecture)
    assert (found["num_hidden_layers"], found["vocab_size"], found["num_experts_per_tok"]) == (4, 100, 2)


COUNTS = [
    ("attention.head_count", 0),
    ("attention.head_count_kv", 0),
    ("attention.key_length", 0),
    ("block_count", 0),
    ("block_count", 2**32),
    ("block_count", -1),
    ("block_count", 4.0),
    ("block_count", "four"),
    ("block_count", True),
    ("block_count", Unread(10**9)),
    ("embedding_length", 2**32),
    ("embedding_length", 63),
    ("expert_count", 2**31),
    ("expert_count", -8),
    ("expert_count", 0),
    ("expert_used_count", 9),
    ("expert_used_count", 0),
    ("nextn_predict_layers", "one"),
    ("nextn_predict_layers", 4),
    ("nextn_predict_layers", -1),
    ("context_length", 2**40),
    ("attention.layer_norm_rms_epsilon", float("nan")),
    ("rope.freq_base", 0.0),
    ("rope.freq_base", float("inf")),
]


@pytest.mark.parametrize(("key", "value"), COUNTS)
def test_numbers_that_no_model_has(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"^a\.gguf: its metadata has no usable qwen3moe\.{key}: .* is needed\."):
        config("qwen3moe", **{key: value})


@pytest.mark.parametrize(
    ("architecture", "changes", "match"),
    [
        ("qwen3moe", {"block_count": 5}, "block_count is 5, but the file has tensors of 4 blocks"),
        ("qwen3moe", {"attention.head_count": [4, 4, 2, 4]}, "attention.head_count is not the same in all layers"),
        ("qwen3moe", {"attention.head_count_kv": 3}, "head_count_kv is 3, which does not divide 4 heads"),
        ("llama", {"attention.head_count": 6}, "head_count is 6, which does not divide 64"),
        ("llama", {"expert_count": 0}, r"is a model without experts \(llama.expert_count\)"),
        ("qwen3moe", {"rope.dimension_count": 8}, "dimension_count is 8 for heads of 16, which are rotated whole"),
        ("glm4moe", {"rope.dimension_count": 7}, "dimension_count: 7, where an even number"),
        ("glm4moe", {"rope.dimension_count": 18}, "dimension_count: 18, where a whole number from 1 to 16"),
        ("exaone-moe", {"attention.sliding_window_pattern": [True] * 3}, "pattern has 3 values for 4 layers"),
        ("lfm2moe", {"attention.head_count_kv": [0, 2]}, "head_count_kv has 2 values for 4 layers"),
        ("afmoe", {"leading_dense_block_count": 4}, "leading_dense_block_count: 4, where a whole number from 0 to 3"),
        ("afmoe", {"expert_weights_scale": -1.0}, "expert_weights_scale: -1.0, where a positive number"),
        ("olmoe", {"attention.clamp_kqv": "8"}, "clamp_kqv: '8', where a positive number"),
        ("deepseek2", {"expert_group_count": 3}, "expert_group_count is 3, of which 1 are used, for 2 of 8 experts"),
        ("deepseek2", {"expert_used_count": 5}, "expert_group_count is 2, of which 1 are used, for 5 of 8 experts"),
        ("deepseek2", {"expert_group_used_count": 3}, "expert_group_used_count: 3, where a whole number from 0 to 2"),
        ("deepseek2", {"rope.dimension_count": 24}, "dimension_count: 24, where a whole number from 1 to 23"),
        ("qwen35moe", {"ssm.time_step_rank": 3}, "time_step_rank is 3, for 2 heads of keys and 32 values"),
        ("qwen35moe", {"ssm.time_step_rank": 0}, "time_step_rank: 0, where a whole number"),
        ("qwen35moe", {"rope.dimension_sections": 3}, "dimension_sections: 3, where a list"),
        ("qwen3moe", {"tokenizer.ggml.eos_token_id": 100}, "eos_token_id is 100, which is none of its 100 tokens"),
    ],
)
def test_numbers_that_do_not_fit_together(architecture: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        config(architecture, **changes)


def test_tensors_that_the_config_needs() -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor token_embd\.weight"):
        config("qwen3moe", shapes=SHAPES)
    with pytest.raises(CheckpointError, match=r"\[64\] is the shape of its tensor token_embd\.weight"):
        config("qwen3moe", shapes=SHAPES | {"token_embd.weight": (64,)})


@pytest.mark.parametrize(
    ("architecture", "changes", "match"),
    [
        ("afmoe", {"expert_gating_func": 1}, "expert_gating_func: 1, where 2, which models"),
        ("afmoe", {"expert_weights_norm": False}, "expert_weights_norm: False, where True, which"),
        ("afmoe", {"expert_weights_norm": "yes"}, "expert_weights_norm: 'yes', where true or false"),
        ("afmoe", {"expert_group_count": 2}, "expert_group_count: 2, where 1, as models"),
        ("glm4moe", {"expert_gating_func": 1}, "expert_gating_func: 1, where 2"),
        ("qwen3moe", {"expert_weights_norm": False}, "expert_weights_norm: False, where True"),
        ("olmoe", {"expert_weights_norm": True}, "expert_weights_norm: True, where False"),
        ("deepseek2", {"expert_gating_func": 1}, "expert_weights_norm: True, where False, as DeepSeek-V2"),
    ],
)
def test_a_choice_of_experts_that_the_model_does_not_make(
    architecture: str, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        config(architecture, **changes)


def test_older_files_without_groups_of_experts() -> None:
    """256 experts are DeepSeek-V3's, of eight groups; Kimi K2, whose file looks the same, has one."""
    groups = {"expert_group_count": None, "expert_group_used_count": None}
    for num_experts, expected in ((256, (8, 4)), (384, (1, 1))):
        found = config("deepseek2", expert_count=num_experts, **groups)
        assert (found["n_group"], found["topk_group"]) == expected


def test_a_pattern_of_windows_as_a_number() -> None:
    assert config("afmoe")["global_attn_every_n_layers"] == 4
    assert config("afmoe", **{"attention.sliding_window_pattern": 2})["global_attn_every_n_layers"] == 2


def test_groups_of_deepseek_v2() -> None:
    changes = {"expert_gating_func": 1, "expert_weights_norm": False}
    found = config("deepseek2", **changes)
    assert (found["model_type"], found["topk_method"], found["n_group"]) == ("deepseek_v2", "group_limited_greedy", 2)
    assert config("deepseek2", **changes, expert_group_count=1)["topk_method"] == "greedy"
