"""Long prompts are computed in chunks: the same tokens for every number of slots, each expert loaded once a chunk."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from support.chat import byte_tokenizer, chat_model
from transformers import DynamicCache

from offload_moe import load
from offload_moe.chat import prompt_chunks
from offload_moe.convert.quantize import quantize
from offload_moe.decode.forward import DecoderForward
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import with_cache
from offload_moe.memory.disk import DiskMover
from offload_moe.memory.mover import Arrived

CHUNK = 16
QUESTION = "How many experts does a prompt of several chunks need, and how often?"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    model = chat_model("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, num_hidden_layers=4)
    model.to(torch.bfloat16).save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    return quantize(root / "model", root / "store")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_chunks, "CPU_PROMPT_TOKENS", CHUNK)


def load_with(store: Path, num_slots: int, prefetch: int) -> Model:
    with load(store) as whole:
        ram = whole.placement.ram.bytes_with(num_slots)
    return load(store, ram=ram, prefetch=prefetch)


def say(model: Model) -> str:
    return "".join(piece.text for piece in model.chat().send(QUESTION, temperature=0, max_new_tokens=12))


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward."""
    seen: list[int] = []
    real = DecoderForward.__call__

    def forward(self: DecoderForward, *, input_ids: torch.Tensor, **rest: object) -> object:
        seen.append(input_ids.shape[1])
        return real(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(DecoderForward, "__call__", forward)
    return seen


@pytest.mark.parametrize("prefetch", [0, 2])
def test_tokens_do_not_depend_on_slots(store: Path, lengths: list[int], prefetch: int) -> None:
    with load(store) as model:
        expected = say(model)
    assert max(lengths) == CHUNK
    assert sum(length > 1 for length in lengths) > 2
    for num_slots in (1, 5, 20):
        with load_with(store, num_slots, prefetch) as model:
            assert say(model) == expected


@pytest.mark.parametrize("fast_path", [True, False])
def test_tokens_do_not_depend_on_the_length_of_chunks(
    store: Path, monkeypatch: pytest.MonkeyPatch, fast_path: bool
) -> None:
    """Nor does what is cached: of the fast path to the bit, else apart from the rounding of torch's products."""
    said, kept = [], []
    for chunk in (5, 16, 1000):
        monkeypatch.setattr(prompt_chunks, "CPU_PROMPT_TOKENS", chunk)
        with load(store, fast_path=fast_path) as model:
            cache = DynamicCache(config=model.hf.config)
            ids = torch.arange(3, 60)[None]
            with torch.inference_mode():
                for part in ids.split(chunk, 1):
                    model.hf(part, **with_cache(cache))
            said.append(say(model))
        kept.append([part for layer in cache.layers for part in (layer.keys, layer.values)])
    assert said[0] == said[1] == said[2]
    assert all(part.dtype == torch.bfloat16 for part in kept[0])
    for parts in kept[1:]:
        assert not fast_path or all(map(torch.equal, parts, kept[0]))
        differs = torch.cat([(a != b).flatten() for a, b in zip(parts, kept[0], strict=True)])
        assert differs.float().mean() < 0.01
        assert all(
            torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-4) for a, b in zip(parts, kept[0], strict=True)
        )


def test_each_expert_is_loaded_at_most_once_a_chunk(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two layers, the next layer's experts are fetched while this one computes, and none twice."""
    loads: list[int] = []
    real = DiskMover.start

    def start(self: DiskMover, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        loads.append(key)
        real(self, key, slot, arrived, is_prefetch=is_prefetch)

    monkeypatch.setattr(DiskMover, "start", start)
    monkeypatch.setattr("offload_moe.engine.load.warm_start", lambda hierarchy, path: None)
    with load_with(store, 16, 2) as model:
        loads.clear()
        model.hf(torch.arange(60)[None])
        assert max(Counter(loads).values()) == 1
        assert model.stats.num_useful_prefetches > 0
        assert model.stats.num_misses <= 8  # those of the first layer; nothing foretells them


def test_a_family_that_does_not_continue_exactly_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    assert prompt_chunks.prompt_chunk_tokens(model) == CHUNK
    monkeypatch.setattr(prompt_chunks, "continues_exactly", lambda hf: False)
    assert prompt_chunks.prompt_chunk_tokens(model) is None
