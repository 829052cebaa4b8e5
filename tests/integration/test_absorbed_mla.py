"""Absorbed latent attention against transformers, which expands the whole history."""

import copy
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model, tiny_prompt
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from offload_moe.decode import make_fast
from offload_moe.decode.latent import NAME, absorb_latents
from offload_moe.families.cache_name import with_cache

TOLERANCE = 1e-4
STEPS = 4

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, object]] = {
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**LATENT, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "minicpm3": {key: LATENT[key] for key in list(LATENT)[:6]},
    "kimi_linear": {
        **LATENT,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "linear_attention", "full_attention", "full_attention"],
    },
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """transformers' own model and the absorbed one."""
    plain = tiny_model(family, **FAMILIES[family]).requires_grad_(False)
    fast_path = copy.deepcopy(plain)
    assert absorb_latents(fast_path) == 3
    return plain, fast_path


def distance(got: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 0.1
    return float((got - expected).norm() / expected.norm())


@torch.inference_mode()
def continue_with(
    model: PreTrainedModel, cache: Any, mask: Tensor, num_tokens: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Logits of some more tokens, and the mask that covers them too."""
    tokens = torch.randint(3, 128, (len(mask), num_tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.nn.functional.pad(mask, (0, num_tokens), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -num_tokens:]
    out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, **with_cache(cache), use_cache=True)
    return out.logits, mask


@torch.inference_mode()
def prompted(model: PreTrainedModel, batch: int) -> tuple[DynamicCache, Tensor, Tensor]:
    """The cache, mask and logits after a prompt."""
    ids, mask = tiny_prompt(batch, 9)
    cache = DynamicCache(config=model.config)
    return cache, mask, model(input_ids=ids, attention_mask=mask, **with_cache(cache), use_cache=True).logits


@pytest.mark.parametrize("batch", [1, 3])
def test_decode_steps_follow_the_expanded_ones(pair: tuple[PreTrainedModel, PreTrainedModel], batch: int) -> None:
    (cache, mask, prompt), (fast_cache, _, fast_prompt) = (prompted(model, batch) for model in pair)
    assert distance(fast_prompt, prompt) < TOLERANCE
    for step in range(STEPS):
        expected, _ = continue_with(pair[0], cache, mask, 1, step)
        got, mask = continue_with(pair[1], fast_cache, mask, 1, step)
        assert 0 < distance(got, expected) < TOLERANCE  # 0 would mean that nothing was absorbed


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_few_tokens_more_and_a_cropped_cache(pair: tuple[PreTrainedModel, PreTrainedModel], batch: int) -> None:
    (cache, mask, _), (fast_cache, _, _) = (prompted(model, batch) for model in pair)
    expected, longer = continue_with(pair[0], cache, mask, 5, 0)
    got, _ = continue_with(pair[1], fast_cache, mask, 5, 0)
    assert 0 < distance(got, expected) < TOLERANCE
    if not all(layer.is_croppable for layer in cache.layers):
        return  # linear attention forgets
    for each in (cache, fast_cache):
        each.crop(-3)
    expected, _ = continue_with(pair[0], cache, longer[:, :-3], 1, 1)
    got, _ = continue_with(pair[1], fast_cache, longer[:, :-3], 1, 1)
    assert distance(got, expected) < TOLERANCE


def test_decode_expands_nothing_and_caches_latents_only(
    pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fast_path = pair
    cache, mask, _ = prompted(fast_path, 3)

    def refuse(*_: object) -> None:
        raise AssertionError("decode expanded the history")

    module = next(module for module in fast_path.modules() if hasattr(type(module), "expand_kv"))
    monkeypatch.setattr(type(module), "expand_kv", refuse)
    continue_with(fast_path, cache, mask, 1, 0)
    config = fast_path.config
    for layer in [layer for layer in cache.layers if layer.is_croppable]:
        assert layer.keys.shape == (3, 1, 10, config.kv_lora_rank)
        assert layer.values.shape == (3, 1, 10, config.qk_rope_head_dim)


def test_prompts_hand_torch_values_as_wide_as_keys(
    pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it writes no scores down."""
    attend, widths = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        widths.append((key.shape[-1], value.shape[-1]))
        return attend(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    prompted(pair[1], 2)
    assert widths == [(24, 24)] * 3


def test_it_works_on_the_eager_function_too(family: str) -> None:
    plain = tiny_model(family, **FAMILIES[family]).requires_grad_(False)
    plain.config._attn_implementation = "eager"
    fast_path = copy.deepcopy(plain)
    make_fast(fast_path, is_exact=False)
    assert fast_path.config._attn_implementation == f"{NAME}_eager"
    (cache, mask, _), (fast_cache, _, _) = (prompted(model, 3) for model in (plain, fast_path))
    expected, _ = continue_with(plain, cache, mask, 1, 0)
    got, _ = continue_with(fast_path, fast_cache, mask, 1, 0)
    assert distance(got, expected) < TOLERANCE


def test_another_attention_function_gets_expanded_keys(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    plain, fast_path = pair
    switched = copy.deepcopy(fast_path)
    switched.config._attn_implementation = plain.config._attn_implementation
    (cache, mask, _), (switched_cache, _, _) = (prompted(model, 3) for model in (plain, switched))
    expected, _ = continue_with(plain, cache, mask, 1, 0)
    assert torch.equal(continue_with(switched, switched_cache, mask, 1, 0)[0], expected)


def test_sparse_relatives_are_left_alone() -> None:
    model = tiny_model("deepseek_v32", **LATENT, index_n_heads=2, index_head_dim=16, index_topk=4, num_hidden_layers=1)
    assert absorb_latents(model) == 0
    assert NAME not in model.config._attn_implementation
