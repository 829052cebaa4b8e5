"""What latent attention holds while it computes: by hand, and against torch's own count of its allocations."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from offload_moe.decode.cache import give_room
from offload_moe.decode.latent import absorb_latents
from offload_moe.families.cache_name import with_cache
from offload_moe.plan.attention import describe_attention
from offload_moe.plan.parameters import describe_model
from offload_moe.plan.working import activation_bytes, cache_bytes
from tests.support.checkpoints import tiny_config
from tests.support.plan import real_shape, tiny_shape
from tests.support.tiny_models import COMMON, FAMILIES, tiny_model

# Attention is by far the widest part; H 64, N 4, R 64, P 16, K 32, V 32.
NARROW: dict[str, Any] = {
    **FAMILIES["deepseek_v3"],
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "max_position_embeddings": 2048,
}
CONTEXT = 1024


def test_works_by_hand() -> None:
    queries, values, expansion, compressed, output = 4 * 48, 4 * 32, 4 * 64, 80, 64
    config = AutoConfig.for_model("deepseek_v3", **(COMMON | NARROW))
    for is_fast_path in (True, False):
        (work,) = describe_model(config, is_fast_path=is_fast_path).attention.works
        assert work.projected == compressed + output + 3 * queries
        assert work.expanded == expansion + queries + values
        assert work.decoded == 2 * 4 + (compressed if is_fast_path else expansion + 2 * queries)
        assert work.scores == (1 if is_fast_path else 2 * 4 + 3)
        assert work.elements(1, 10, on_cpu=False) == work.projected + 10 * work.decoded
        assert work.elements(5, 10, on_cpu=False) == 5 * work.projected + 10 * work.expanded
        padded = expansion + 2 * queries
        assert work.elements(5, 10, on_cpu=True) == 5 * work.projected + 10 * padded + 50 * work.scores


def test_native_calls_hold_a_part_of_a_prompt_and_expand_nothing() -> None:
    queries, values, compressed, output = 4 * 48, 4 * 32, 80, 64
    shape = describe_model(AutoConfig.for_model("deepseek_v3", **(COMMON | NARROW)))
    (work,) = shape.attention.works
    row = compressed + output + queries + values + 4 * (2 * 64 + 16)
    assert shape.attention.is_native
    assert [work.native_elements(count) for count in (1, 100, 512)] == [row, 100 * row, 256 * row]
    wide = real_shape("DeepSeek-V3").attention.works[0]
    assert wide.native_elements(512) == (32 << 20) // (4 * wide.native) * wide.native
    for context in (1024, 2048):
        planned = activation_bytes(shape, context, torch.float32, kept=torch.bfloat16, num_new=512)
        assert planned == (512 * 4 * 64 + 256 * row + context * 80 // 2) * 4


def test_prompts_are_native_where_every_layer_is() -> None:
    families = {"qwen3_moe": {}, "gpt_oss": {}, "deepseek_v3": {}, "mixtral": {"head_dim": 24}}  # 8 rotated dims, 24
    found = {name: tiny_shape(name, **changes).attention.is_native for name, changes in families.items()}
    assert found == {"qwen3_moe": True, "gpt_oss": True, "deepseek_v3": False, "mixtral": False}
    assert real_shape("DeepSeek-V3").attention.is_native
    assert not real_shape("Qwen3.5-35B-A3B").attention.is_native


@pytest.mark.parametrize("is_fast_path", [True, False])
@pytest.mark.parametrize("num_new", [512, 128, 1])
def test_latents_need_what_is_planned(is_fast_path: bool, num_new: int) -> None:
    model = tiny_model("deepseek_v3", **NARROW)
    shape = describe_model(model.config, is_fast_path=is_fast_path)
    if is_fast_path:
        assert absorb_latents(model) == 2
    planned = activation_bytes(shape, CONTEXT, torch.float32, num_new=num_new)
    peak = _peak_of_last(model, num_new)
    assert peak <= planned + cache_bytes(shape, CONTEXT, torch.float32)  # the cache may be copied meanwhile
    if num_new == 512:
        assert peak >= 0.85 * planned


def _peak_of_last(model: PreTrainedModel, num_new: int) -> int:
    """Bytes that are allocated at once while the last tokens of the context are computed."""
    cache = DynamicCache(config=model.config)
    ids = torch.full((1, CONTEXT), 3)
    with torch.inference_mode():
        model(ids[:, :-num_new], **with_cache(cache))
        give_room(cache, CONTEXT)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model(ids[:, -num_new:], **with_cache(cache), logits_to_keep=1)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_scores_are_planned_where_they_are_written_down() -> None:
    sparse = (
        tiny_shape("deepseek_v3").attention,
        describe_attention(
            tiny_model("deepseek_v32", **FAMILIES["deepseek_v3"], index_n_heads=2, index_head_dim=16, index_topk=8),
            is_fast_path=True,
        ),
    )
    assert [work.scores for attention in sparse for work in attention.works] == [1, 2 * 4 + 3]


@pytest.mark.parametrize("name", ["Mixtral-8x7B-v0.1", "Qwen3-235B-A22B", "gpt-oss-120b"])
def test_others_write_none(name: str) -> None:
    assert {work.scores for work in real_shape(name).attention.works} == {0}


def test_layers_with_heads_of_their_own() -> None:
    """The config has no number of heads for all layers then."""
    works = describe_model(tiny_config("dots3_note_text"), is_fast_path=True).attention.works
    assert {work.scores for work in works} == {2 * 4 + 3, 2 * 64 + 3}


def test_an_indexer_keeps_keys_beside_the_cache() -> None:
    *linear, full = describe_model(tiny_config("qwen4_exp_text"), is_fast_path=True).attention.cache_layers
    keys_and_values, indexer = 2 * 2 * 8, 8
    assert [layer.per_token for layer in linear] == [0, 0, 0]
    assert full.per_token == keys_and_values + indexer
