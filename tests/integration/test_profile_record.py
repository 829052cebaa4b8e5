"""Recording a running model: what the routers really chose, what the tiers really did, and the same tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import open_model
from support.tiny_models import FAMILIES, tiny_model, tiny_prompt

from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model
from offload_moe.errors import ConfigError
from offload_moe.families.cache_name import cache_from, with_cache
from offload_moe.profile import recorder as recorder_module
from offload_moe.profile.trace import Trace, load_trace, save_trace

NUM_PROMPT, NUM_NEW = 9, 12


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    for family in FAMILIES:
        tiny_model(family).to(torch.bfloat16).save_pretrained(root / family)
    return {family: quantize(root / family, root / f"{family}-nf4", codec="nf4") for family in FAMILIES}


def greedy(model: Model, seed: int = 0) -> list[int]:
    ids, _ = tiny_prompt(1, NUM_PROMPT, seed)
    out: torch.Tensor = model.hf.generate(
        input_ids=ids, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, disable_compile=True
    )
    return out[0].tolist()


class Spy:
    """What the experts modules and the routers were given, by hooks of our own."""

    def __init__(self, model: Model) -> None:
        self.index: list[list[Any]] = [[] for _ in model.layers]
        self.weights: list[list[Any]] = [[] for _ in model.layers]
        self.logits: list[list[Any]] = [[] for _ in model.layers]
        for number, layer in enumerate(model.layers):
            layer.module.register_forward_pre_hook(self._keep_experts(number), with_kwargs=True)
            block = model.hf.get_submodule(layer.name.rpartition(".")[0])
            router = block.gate if hasattr(block, "gate") else block.router
            router.register_forward_hook(self._keep_router(number))

    def _keep_experts(self, number: int) -> Any:
        def keep(module: Any, args: Any, kwargs: Any) -> None:
            values = [*args, *kwargs.values()]
            self.index[number].append(values[1].numpy().copy())
            self.weights[number].append(values[2].float().numpy().copy())

        return keep

    def _keep_router(self, number: int) -> Any:
        def keep(module: Any, args: Any, out: Any) -> None:
            self.logits[number].append(out[0].float().numpy().copy())

        return keep

    def stacked(self, what: list[list[Any]]) -> Any:
        return np.stack([np.concatenate(layer) for layer in what], axis=1)


@pytest.fixture
def recorded(stores: dict[str, Path]) -> Iterator[tuple[Model, Trace, Spy]]:
    with open_model(stores["qwen3_moe"], num_slots=9, prefetch=0) as model:
        spy = Spy(model)
        with model.trace() as recorder:
            greedy(model)
            recorder.group = "second"
            greedy(model, seed=1)
        yield model, recorder.trace(), spy


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_trace_is_what_the_routers_chose(family: str, stores: dict[str, Path]) -> None:
    with open_model(stores[family]) as model:
        spy = Spy(model)
        with model.trace() as recorder:
            tokens = greedy(model)
        trace = recorder.trace()
    np.testing.assert_array_equal(trace.experts, spy.stacked(spy.index))
    np.testing.assert_allclose(trace.weights, spy.stacked(spy.weights), rtol=1e-3)
    logits = torch.from_numpy(spy.stacked(spy.logits))
    expected = logits.softmax(-1) if family != "deepseek_v3" else logits.sigmoid() / logits.sigmoid().sum(-1, True)
    assert trace.router_probabilities is not None
    np.testing.assert_allclose(trace.router_probabilities, expected, rtol=2e-3, atol=1e-4)
    assert trace.token_ids is not None
    assert trace.token_ids.tolist() == tokens[:-1]  # the last one is chosen, not computed


def test_recording_does_not_change_tokens(stores: dict[str, Path]) -> None:
    with open_model(stores["qwen3_moe"], num_slots=9) as model:
        before = greedy(model)
        with model.trace():
            assert greedy(model) == before
        assert greedy(model) == before


def test_sequences_prompts_and_forwards(recorded: tuple[Model, Trace, Spy]) -> None:
    _, trace, _ = recorded
    length = NUM_PROMPT + NUM_NEW - 1
    assert trace.sequence_lengths.tolist() == [length, length]
    assert trace.is_prompt is not None
    assert trace.forwards is not None
    assert trace.is_prompt.tolist() == 2 * ([True] * NUM_PROMPT + [False] * (NUM_NEW - 1))
    assert trace.forwards[:11].tolist() == [0] * NUM_PROMPT + [1, 2]
    metadata = json.loads(trace.metadata)
    assert metadata["groups"] == ["", "second"]
    assert metadata["num_between_tokens"] == 2 * (NUM_NEW - 1)
    assert metadata["num_slots"]["ram"] in (9, 10)
    assert metadata["num_dropped_forwards"] == 0


def test_a_cache_that_was_cut_begins_a_sequence(stores: dict[str, Path]) -> None:
    """As when a conversation goes back to an earlier message."""
    ids, _ = tiny_prompt(1, NUM_PROMPT)
    with open_model(stores["qwen3_moe"]) as model, torch.inference_mode():
        with model.trace() as recorder:
            cache = cache_from(model.hf(input_ids=ids[:, :6]))
            model.hf(input_ids=ids[:, 6:8], **with_cache(cache))
            cache.crop(-4)
            model.hf(input_ids=ids[:, 4:5], **with_cache(cache))
        trace = recorder.trace()
    assert trace.sequence_lengths.tolist() == [8, 1]
    assert trace.is_prompt is not None
    assert trace.is_prompt.tolist() == [True] * 8 + [False]


def test_outcomes_bytes_and_stalls_are_those_of_the_counters(stores: dict[str, Path]) -> None:
    with open_model(stores["qwen3_moe"], num_slots=9) as model:
        ids, _ = tiny_prompt(1, 1)
        with model.trace() as recorder:
            before = model.stats.copy()
            for _ in range(2):
                model.hf.generate(input_ids=ids, max_new_tokens=80, do_sample=False, eos_token_id=None)
            used = model.stats.since(before)
        trace = recorder.trace()
        record_bytes = model.engine.hierarchy.pools.slot_bytes
    assert trace.outcomes is not None
    counts = np.bincount(trace.outcomes.ravel(), minlength=3)
    assert counts.tolist() == [used.num_hits, used.num_delayed_hits, used.num_misses]
    assert min(used.num_misses, used.num_prefetches, used.num_useful_prefetches) > 0
    assert trace.loaded_bytes is not None
    assert trace.loaded_bytes.sum() % record_bytes == 0
    assert trace.loaded_bytes.sum() == pytest.approx(used.disk_bytes, abs=4 * record_bytes)
    assert trace.stall_s is not None
    assert trace.stall_s.sum() == pytest.approx(used.stall_s)
    assert trace.prefetch_issued is not None
    assert trace.prefetch_issued.sum() == used.num_prefetches
    assert trace.prefetch_useful is not None
    assert trace.prefetch_useful.sum() == used.num_useful_prefetches
    assert trace.prefetch_issued[:, 0].sum() == 0  # nothing looks ahead to the first layer
    assert trace.compute_s is not None
    assert (trace.compute_s > 0).all()
    assert trace.forward_s is not None
    assert (trace.forward_s > trace.compute_s.sum(1) + trace.stall_s.sum((1, 2))).all()
    assert trace.computed_on_cpu is not None
    assert trace.computed_on_cpu.all()


def test_a_miss_is_a_miss_of_that_expert(recorded: tuple[Model, Trace, Spy]) -> None:
    """From a cold start with room for everything, exactly an expert's first use is a miss."""
    model, _, _ = recorded
    with open_model(model.store.path, prefetch=0) as cold:
        ids, _ = tiny_prompt(1, 1)
        with cold.trace() as recorder:
            cold.hf.generate(input_ids=ids, max_new_tokens=30, do_sample=False, eos_token_id=None)
        trace = recorder.trace()
    assert trace.outcomes is not None
    seen: set[tuple[int, int]] = set()
    for token in range(trace.num_tokens):
        for layer in range(trace.num_layers):
            for expert, outcome in zip(trace.experts[token, layer], trace.outcomes[token, layer, :, 0], strict=True):
                assert (outcome == 0) == ((layer, expert) in seen)
                seen.add((layer, int(expert)))


def test_chunks_join(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(stores["qwen3_moe"]) as model:
        with model.trace() as recorder:
            greedy(model)
        whole = recorder.trace()
        monkeypatch.setattr(recorder_module, "FORWARDS_PER_CHUNK", 5)
        with model.trace() as recorder:
            greedy(model)
        pieces = recorder.trace()
    assert len(recorder._columns) == 3
    assert pieces.sequence_lengths.tolist() == whole.sequence_lengths.tolist()
    np.testing.assert_array_equal(pieces.experts, whole.experts)
    assert pieces.forwards is not None
    np.testing.assert_array_equal(pieces.forwards, whole.forwards)


def test_the_trace_survives_a_file(recorded: tuple[Model, Trace, Spy], tmp_path: Path) -> None:
    _, trace, _ = recorded
    save_trace(trace, tmp_path / "t.npz")
    again = load_trace(tmp_path / "t.npz")
    for name in Trace.__slots__:
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name), err_msg=name)


def test_nothing_is_left_behind(stores: dict[str, Path]) -> None:
    with open_model(stores["qwen3_moe"]) as model:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
        with model.trace():
            pass
        assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
        assert model.engine.hierarchy.scheduler.observer is None
        assert all(bound.recorder is None for bound in model.engine.experts)


def test_refusals(stores: dict[str, Path]) -> None:
    with open_model(stores["qwen3_moe"]) as model, model.trace() as recorder:
        with pytest.raises(ConfigError, match="Nothing was recorded"):
            recorder.trace()
        ids, mask = tiny_prompt(2, 5)
        with pytest.raises(ConfigError, match="not a batch of 2"):
            model.hf(input_ids=ids, attention_mask=mask)


def test_an_interrupted_forward_is_left_out(stores: dict[str, Path]) -> None:
    with open_model(stores["qwen3_moe"]) as model:
        ids, _ = tiny_prompt(1, 4)
        with model.trace() as recorder:
            handle = model.layers[1].module.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model.hf(input_ids=ids)
            handle.remove()
            model.hf(input_ids=ids)
        assert recorder.num_dropped == 1
        assert recorder.trace().num_tokens == 4


def test_embeddings_instead_of_tokens_are_left_out(stores: dict[str, Path]) -> None:
    ids, _ = tiny_prompt(1, 4)
    with open_model(stores["qwen3_moe"]) as model, model.trace() as recorder:
        model.hf(inputs_embeds=model.hf.get_input_embeddings()(ids))
        model.hf(ids)
    assert recorder.num_dropped == 1
    assert recorder.trace().token_ids.tolist() == ids[0].tolist()  # type: ignore[union-attr]
