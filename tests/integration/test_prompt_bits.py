"""A prompt's results do not depend on how it is cut: in one piece, in chunks, behind a kept prefix, token by token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import open_model
from support.native_stores import STORES, write_stores
from torch import Tensor
from transformers import DynamicCache

from offload_moe import load
from offload_moe.decode.cache import RoomyLayer, RoomySlidingLayer
from offload_moe.decode.layer import NativeLayer
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import with_cache
from offload_moe.native import kernels

NUM_TOKENS = 61
CUTS = ([61], [20, 41], [1, 9, 8, 30, 13], [45, 16], [1] * 61)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_stores(tmp_path_factory.mktemp("stores"))


def prompt(length: int = NUM_TOKENS) -> Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def forward(model: Model, ids: Tensor, cut: Sequence[int], cache: DynamicCache) -> Tensor:
    """Logits ``[T, V]`` of all tokens, computed so many at a time."""
    parts = ids.split(list(cut), dim=1)
    return torch.cat([model.hf(part, **with_cache(cache)).logits[0] for part in parts])


def new_cache(model: Model) -> DynamicCache:
    return DynamicCache(config=model.hf.config)


def contents(cache: DynamicCache) -> list[Tensor]:
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each native call of a layer outside of spans."""
    rows: list[int] = []
    call = NativeLayer.__call__

    def counted(self: NativeLayer, x: Tensor, step: Any) -> Tensor:
        rows.append(x.shape[1])
        return call(self, x, step)

    monkeypatch.setattr(NativeLayer, "__call__", counted)
    return rows


@pytest.mark.parametrize("name", STORES)
def test_every_cut_gives_the_same_bits(name: str, stores: dict[str, Path], calls: list[int]) -> None:
    """Also where a window of 16 tokens slides through the prompt."""
    with open_model(stores[name]) as model:
        results, caches = [], []
        for cut in CUTS:
            caches.append(new_cache(model))
            results.append(forward(model, prompt(), cut, caches[-1]))
        assert {61, 20, 41, 30, 45} <= {*calls}
    assert results[0].norm() > 1
    for logits, cache in zip(results, caches, strict=True):
        assert torch.equal(logits, results[0])
        assert cache.get_seq_length() == NUM_TOKENS
        assert all(map(torch.equal, contents(cache), contents(caches[0])))


@pytest.mark.parametrize("name", ["qwen3_moe, int8", "gpt_oss, int8", "deepseek_v3, nf4"])
def test_threads_and_slots_change_no_bit(name: str, stores: dict[str, Path]) -> None:
    with open_model(stores[name]) as model:
        expected = forward(model, prompt(), [61], new_cache(model))
    for num_threads, num_slots in ((2, None), (1, 3), (2, 5)):
        with open_model(stores[name], num_slots) as model:
            kernels.set_threads(num_threads)
            try:
                assert torch.equal(forward(model, prompt(), [30, 31], new_cache(model)), expected)
            finally:
                kernels.set_threads(1)


def test_a_prompt_beyond_a_section_of_positions(stores: dict[str, Path]) -> None:
    ids = torch.randint(3, 64, (1, 530), generator=torch.Generator().manual_seed(2))
    with open_model(stores["qwen3_moe, int8"]) as model:
        model.hf.config.max_position_embeddings = 1024
        whole = forward(model, ids, [530], new_cache(model))
        cut = forward(model, ids, [500, 13, 17], new_cache(model))
        last = forward(model, ids, [500, *[1] * 30], new_cache(model))
    assert torch.equal(whole, cut)
    assert torch.equal(whole, last)


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each update of a cache, which returns a whole layer of it in fp32."""
    seen: list[int] = []
    for kind in (RoomyLayer, RoomySlidingLayer):
        update = kind.update

        def counted(self: Any, keys: Tensor, *rest: Any, update: Any = update, **settings: Any) -> Any:
            seen.append(keys.shape[2])
            return update(self, keys, *rest, **settings)

        monkeypatch.setattr(kind, "update", counted)
    return seen


@pytest.mark.parametrize("name", ["mixtral, nf4", "qwen3_moe, int8", "olmoe, nf4", "gpt_oss, int8"])
def test_modules_have_the_same_bits(name: str, stores: dict[str, Path], calls: list[int], widened: list[int]) -> None:
    """A hook sends tokens through them; masks of continued prompts and of windows are recognized."""
    with open_model(stores[name]) as model:
        expected = forward(model, prompt(), [61], new_cache(model))
        calls.clear()
        widened.clear()
        handle = model.hf.model.layers[1].input_layernorm.register_forward_hook(lambda *_: None)
        for cut in ([61], [20, 41], [1, 9, 8, 43], [1] * 61):
            assert torch.equal(forward(model, prompt(), cut, new_cache(model)), expected)
        handle.remove()
    assert not calls
    assert not any(widened)


def test_projections_that_are_not_quantized_read_the_cache_as_it_lies(
    stores: dict[str, Path], calls: list[int], widened: list[int]
) -> None:
    results = []
    for is_fast in (True, False):
        with load(stores["qwen3_moe, int8"], fast_path=is_fast, dense_codec="bf16") as model:
            widened.clear()
            results.append(forward(model, prompt(), [40, 1, 1, 19], new_cache(model)))
            assert any(widened) == (not is_fast)
    assert not calls
    assert results[0].norm() > 1
    assert (results[0] - results[1]).norm() < 0.02 * results[1].norm()


def test_a_prompt_is_what_transformers_computes(stores: dict[str, Path], calls: list[int]) -> None:
    """Against the same store in full precision of its activations, whose prompts its modules compute."""
    for name in ("qwen3_moe, int8", "gpt_oss, int8", "deepseek_v3, nf4"):
        with load(stores[name], exact=True) as model:
            expected = forward(model, prompt(), [61], new_cache(model))
        assert not calls
        with load(stores[name]) as model:
            got = forward(model, prompt(), [61], new_cache(model))
        assert calls
        calls.clear()
        assert (got - expected).norm() < 0.1 * expected.norm()


def test_a_window_gives_the_room_of_a_prompt_back(stores: dict[str, Path]) -> None:
    with open_model(stores["gpt_oss, int8"]) as model:
        cache = new_cache(model)
        forward(model, prompt().repeat(1, 8), [8 * NUM_TOKENS], cache)
        sliding = [layer for layer in cache.layers if layer.is_sliding]
        assert sliding
        for layer in sliding:
            assert layer.keys.shape[2] == 15
            assert layer.keys.untyped_storage().nbytes() == 2 * 2 * 16 * 256


@pytest.mark.parametrize("mask", [None, torch.ones(1, NUM_TOKENS, dtype=torch.int64)])
def test_an_empty_cache_of_any_kind_takes_a_prompt(stores: dict[str, Path], mask: Tensor | None) -> None:
    with open_model(stores["qwen3_moe, int8"]) as model, torch.inference_mode():
        expected = forward(model, prompt(), [61], new_cache(model))
        got = model.hf(prompt(), attention_mask=mask, **with_cache(DynamicCache())).logits[0]
    assert torch.equal(got, expected)


def test_padded_prompts_and_batches_take_the_modules(stores: dict[str, Path], calls: list[int]) -> None:
    with open_model(stores["qwen3_moe, int8"]) as model, torch.inference_mode():
        expected = forward(model, prompt(), [61], new_cache(model))
        calls.clear()
        padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), prompt()), 1)
        mask = (torch.arange(64) >= 3).long()[None]
        got = model.hf(padded, attention_mask=mask, **with_cache(new_cache(model))).logits[0, 3:]
        both = model.hf(prompt().repeat(2, 1), **with_cache(new_cache(model))).logits
    assert not calls
    for each in (got, *both):
        assert (each - expected).norm() < 0.05 * expected.norm()
