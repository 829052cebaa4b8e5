"""Llama 4 on the fast path: chunks of attention, layers without rotation, experts whose inputs are scaled."""

from pathlib import Path

import pytest
import torch
from support.models import open_model
from support.tiny_models import tiny_model
from torch import Tensor
from transformers import DynamicCache

from offload_moe.convert.quantize import quantize
from offload_moe.decode import roll_back
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import with_cache

CHUNK, NUM_PROMPT, NUM_STEPS = 7, 17, 14
ROUNDING = 1e-3  # keys and values that round to the neighbour in bf16
SETTINGS = {
    "head_dim": 16,
    "num_hidden_layers": 5,
    "moe_layers": [1, 2, 4],
    "no_rope_layers": [1, 0, 1, 0, 1],
    "layer_types": [*["chunked_attention", "full_attention"] * 2, "chunked_attention"],
    "attention_chunk_size": CHUNK,
    "floor_scale": 3,
    "attn_scale": 0.7,
    "num_local_experts": 6,
    "intermediate_size_mlp": 64,
}
IDS = torch.randint(3, 120, (1, NUM_PROMPT + NUM_STEPS), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", params=[1, 2], ids=lambda top_k: f"top {top_k}")
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama4")
    hf = tiny_model("llama4_text", **SETTINGS, num_experts_per_tok=request.param)
    hf.to(torch.bfloat16).save_pretrained(root / "checkpoint")
    return quantize(root / "checkpoint", root / "store", codec="int8")


@torch.inference_mode()
def logits_of(model: Model, parts: list[int], cache: DynamicCache | None = None) -> Tensor:
    """Of the first tokens, in parts of so many."""
    cache = DynamicCache(config=model.hf.config) if cache is None else cache
    return torch.cat([model.hf(ids, **with_cache(cache)).logits[0] for ids in IDS[:, : sum(parts)].split(parts, 1)])


def test_a_long_prompt_and_steps_over_the_borders_of_chunks_are_the_modules(store: Path) -> None:
    parts = [NUM_PROMPT, *[1] * NUM_STEPS]
    with open_model(store) as model:
        assert [layer.kind for layer in model.fast_path.layers] == ["span"] * 5
        got = logits_of(model, parts)
    with open_model(store, fast_path=False) as model:
        expected = logits_of(model, parts)
    assert expected.abs().max() > 1
    distances = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert distances.max() < ROUNDING


def test_bits_depend_on_neither_parts_nor_slots_nor_the_kind_of_cache(store: Path) -> None:
    with open_model(store) as model:
        expected = logits_of(model, [1] * (NUM_PROMPT + NUM_STEPS))
        for parts in ([NUM_PROMPT, 8, 6], [3, 8, 1, 7, 12]):
            assert torch.equal(logits_of(model, parts), expected)
        assert torch.equal(logits_of(model, [20, 1, 8], DynamicCache()), expected[:29])  # which keeps all tokens
    with open_model(store, 4) as model:
        assert torch.equal(logits_of(model, [NUM_PROMPT, *[1] * NUM_STEPS]), expected)


def test_tokens_are_taken_back_over_the_border_of_a_chunk(store: Path) -> None:
    before = 2 * CHUNK - 2
    with open_model(store) as model:
        expected = logits_of(model, [before, 1, 1, 1])
        cache = DynamicCache(config=model.hf.config)
        logits_of(model, [before], cache)
        with torch.inference_mode():
            model.hf(IDS[:, -5:], **with_cache(cache))  # others, of which none stays
            roll_back(cache, 5)
            got = model.hf(IDS[:, before : before + 3], **with_cache(cache)).logits[0]
        assert torch.equal(got, expected[before:])
