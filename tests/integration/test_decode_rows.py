"""Several new tokens in one pass: the bits of the same tokens one by one, in hidden states, logits and caches."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import open_model
from support.native_stores import STORES, write_stores
from support.tiny_models import tiny_model
from torch import Tensor
from transformers import DynamicCache

from offload_moe.convert.quantize import quantize
from offload_moe.decode import pass_rows
from offload_moe.decode.layer import NativeLayer
from offload_moe.decode.plan import PassPlan
from offload_moe.decode.span import LayerSpan
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import with_cache
from offload_moe.native import kernels
from tests.support.passes import rows_of_calls

NUM_PROMPT = 9
NEXT = torch.tensor([7, 9, 11, 5, 5, 60, 3, 42])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each native pass of a span."""
    return rows_of_calls(monkeypatch, LayerSpan, "pass_natively")


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    kernels.set_threads(request.param)
    yield request.param
    kernels.set_threads(1)


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def after_prompt(model: Model, seed: int = 0, length: int = NUM_PROMPT) -> DynamicCache:
    cache = DynamicCache(config=model.hf.config)
    model.hf(prompt(length, seed), **with_cache(cache))
    return cache


@torch.inference_mode()
def forward(model: Model, ids: Tensor, cache: DynamicCache, **settings: Any) -> tuple[Tensor, Tensor]:
    """Hidden states ``[T, H]`` and logits ``[T, V]``."""
    hidden: list[Tensor] = []
    handle = model.hf.lm_head.register_forward_pre_hook(lambda module, args: hidden.append(args[0][0]))
    logits = model.hf(ids[None], **with_cache(cache), **settings).logits[0]
    handle.remove()
    return hidden[0], logits


def one_by_one(model: Model, ids: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
    results = [forward(model, token, cache) for token in ids.split(1)]
    hidden, logits = zip(*results, strict=True)
    return torch.cat(hidden), torch.cat(logits)


def check(got: Sequence[Tensor], expected: Sequence[Tensor], caches: Sequence[DynamicCache]) -> None:
    """The same results, and pairs of caches with the same contents."""
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs.abs().max() > 1e-2
        assert torch.equal(mine, theirs)
    for first, second in zip(caches[::2], caches[1::2], strict=True):
        assert first.get_seq_length() == second.get_seq_length()
        for mine, theirs in zip(first.layers, second.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("name", STORES)
def test_new_tokens_of_a_sequence(name: str, num_threads: int, stores: dict[str, Path], passes: list[int]) -> None:
    """Also where the room of the cache has to grow, and where a window of 16 tokens slides in between."""
    with open_model(stores[name]) as model:
        for count, length in ((2, 9), (3, 14), (8, 9), (5, 31)):
            caches = [after_prompt(model, length=length) for _ in range(2)]
            expected = one_by_one(model, NEXT[:count], caches[1])
            passes.clear()
            check(forward(model, NEXT[:count], caches[0]), expected, caches)
            assert {*passes} == {count}


@pytest.mark.parametrize("name", STORES)
def test_new_tokens_of_several_sequences(
    name: str, num_threads: int, stores: dict[str, Path], passes: list[int]
) -> None:
    sequences = ((9, NEXT[:1]), (20, NEXT[1:2]), (5, NEXT[2:6]), (13, NEXT[6:]))
    with open_model(stores[name]) as model:
        pairs = [[after_prompt(model, length, length) for _ in range(2)] for length, _ in sequences]
        parts = zip(sequences, pairs, strict=True)
        expected = torch.cat([one_by_one(model, ids, second)[0] for (_, ids), (_, second) in parts])
        passes.clear()
        with torch.inference_mode():
            rows = [(ids, first) for (_, ids), (first, _) in zip(sequences, pairs, strict=True)]
            got = pass_rows(model.hf, rows)
        assert got is not None
        check([got], [expected], [cache for pair in pairs for cache in pair])
        assert {*passes} == {8}


@pytest.mark.parametrize("num_slots", [2, 6, 12, 16, 20])
@pytest.mark.parametrize(
    "name", ["qwen3_moe, int8", "qwen2_moe, nf4", "phimoe, nf4", "deepseek_v3, nf4", "llama4, nf4"]
)
def test_experts_come_while_rows_are_computed(
    name: str, num_slots: int, stores: dict[str, Path], passes: list[int]
) -> None:
    with open_model(stores[name]) as model:
        cache = after_prompt(model)
        expected = one_by_one(model, NEXT[:4], cache)
        layers, most = len(model.hf.model.layers), model.store.num_experts
    with open_model(stores[name], num_slots) as model:
        ours = after_prompt(model)
        before = model.stats.copy()
        passes.clear()
        check(forward(model, NEXT[:4], ours), expected, [ours, cache])
        seen = model.stats.since(before)
        assert bool(passes) == (num_slots >= 2 * min(most, 4 * model.hf.config.num_experts_per_tok))
        assert seen.num_acquires in (layers, layers - 1)  # the first one of deepseek_v3 and of llama4 is dense
        assert seen.num_hits + seen.num_delayed_hits + seen.num_misses == seen.num_accesses <= layers * most
        residency = model.engine.hierarchy.scheduler.residency
        assert not any(residency.num_leases(slot) for slot in range(residency.num_slots))
        assert residency.num_reserved == 0


def test_layers_outside_of_spans_take_rows(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, and as a module."""
    calls = rows_of_calls(monkeypatch, NativeLayer, "__call__")
    with open_model(stores["deepseek_v3, nf4"]) as model, model.trace():
        caches = [after_prompt(model) for _ in range(2)]
        expected = one_by_one(model, NEXT[:3], caches[1])
        calls.clear()
        check(forward(model, NEXT[:3], caches[0]), expected, caches)
    assert calls == [3] * len(model.fast_path.layers)


def test_an_undeclared_layer_takes_rows_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload_moe.decode import plan as decode_plan

    spec_of = decode_plan.layer_spec
    monkeypatch.setattr(decode_plan, "layer_spec", lambda layer: spec_of(layer) if layer.self_attn.layer_idx else None)
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    with open_model(quantize(tmp_path / "model", tmp_path / "store", codec="nf4")) as model:
        assert [layer.kind for layer in model.fast_path.layers] == ["modules", "span", "span"]
        caches = [after_prompt(model) for _ in range(2)]
        expected = one_by_one(model, NEXT[:3], caches[1])
        check(forward(model, NEXT[:3], caches[0]), expected, caches)


def test_positions_that_are_given_count(stores: dict[str, Path]) -> None:
    with open_model(stores["mixtral, nf4"]) as model:
        caches = [after_prompt(model) for _ in range(2)]
        positions = torch.tensor([[20, 22, 23]])
        parts = [forward(model, NEXT[t : t + 1], caches[1], position_ids=positions[:, t : t + 1])[1] for t in range(3)]
        got = forward(model, NEXT[:3], caches[0], position_ids=positions)[1]
        check([got], [torch.cat(parts)], caches)
        assert not torch.equal(got, forward(model, NEXT[:3], after_prompt(model))[1])


def noted(told: list[Any], access: Any, layer: int, keys: Any, weights: Any = None, num_tokens: int = 1) -> None:
    told.append((layer, dict(zip(keys, weights, strict=True)), num_tokens))
    access(layer, keys, weights, num_tokens)


def test_rows_are_counted_as_a_prompt_of_them_is(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    """Experts that several rows chose are one use each; the policy is told their shares of the rows."""
    counted = []
    for is_native in (True, False):
        with open_model(stores["qwen3_moe, int8"]) as model:
            cache, scheduler = after_prompt(model), model.engine.hierarchy.scheduler
            passes.clear()
            uses, before, told = scheduler.uses.counts, model.stats.copy(), []
            access = scheduler.residency.policy.access

            monkeypatch.setattr(scheduler.residency.policy, "access", partial(noted, told, access))
            with nullcontext() if is_native else model.trace():  # recorded, they go layer by layer
                forward(model, NEXT[:5], cache)
            assert passes == [5] * is_native
            seen = model.stats.since(before)
            used = {key: count - uses.get(key, 0) for key, count in scheduler.uses.counts.items()}
            counted.append((told, used, seen.num_acquires, seen.num_hits, seen.num_accesses))
    assert counted[0] == counted[1]
    assert any(share < 1 for _, shares, _ in counted[0][0] for share in shares.values())
    assert {num_tokens for *_, num_tokens in counted[0][0]} == {5}


def test_what_cannot_pass_together_is_left_to_forwards(stores: dict[str, Path]) -> None:
    with open_model(stores["mixtral, nf4"]) as model, torch.inference_mode():
        cache, token = after_prompt(model), NEXT[:1]
        assert pass_rows(model.hf, [(token, DynamicCache(config=model.hf.config))]) is None
        assert pass_rows(model.hf, [(token, cache), (token, cache)]) is None
        assert pass_rows(model.hf, [(NEXT, cache), (token, after_prompt(model))]) is None
        assert pass_rows(model.hf, [(NEXT[:0], cache)]) is None
        assert pass_rows(model.hf, []) is None
        assert cache.get_seq_length() == NUM_PROMPT
        handle = model.hf.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        assert pass_rows(model.hf, [(token, cache)]) is None
        handle.remove()
        assert pass_rows(model.hf, [(token, cache)]) is not None
        assert cache.get_seq_length() == NUM_PROMPT + 1


def test_guesses_of_an_assistant_are_verified_in_passes(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    call = PassPlan.__call__

    def counted(self: PassPlan, x: Tensor, *args: Any) -> Tensor:
        counts.append(x.shape[1])
        return call(self, x, *args)

    monkeypatch.setattr(PassPlan, "__call__", counted)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    with open_model(stores["qwen3_moe, int8"]) as model:
        ids = prompt(NUM_PROMPT)
        expected = model.hf.generate(ids, **settings)
        counts.clear()
        got = model.hf.generate(ids, prompt_lookup_num_tokens=4, **settings)
    assert torch.equal(got, expected)
    assert max(counts) > 1
