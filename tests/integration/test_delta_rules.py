"""Models with linear attention by gated delta rules decode natively where the store is quantized."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from support.models import open_model
from support.tiny_models import tiny_model, tiny_prompt
from torch import Tensor
from transformers import DynamicCache

from offload_moe import load
from offload_moe.convert.quantize import quantize
from offload_moe.decode import keep_next, next_logits, pass_rows, roll_back, takes_rows, why_no_rows
from offload_moe.decode.delta import DeltaForward, fuse_delta_rules
from offload_moe.decode.delta_step import delta_step
from offload_moe.decode.dense import QuantLinear
from offload_moe.decode.plan import PassPlan
from offload_moe.decode.probe import Uncovered
from offload_moe.decode.span import LayerSpan
from offload_moe.errors import TransferError
from offload_moe.families.cache_name import with_cache
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.plan import Machine, make_plan
from tests.support.card_model import LINEAR_ATTENTION, logits
from tests.support.passes import contents, rows_of_calls

FAMILIES = ("qwen3_next", "qwen3_5_moe_text")
NUM_STEPS = 7  # of `logits` behind a prompt, which gives the first token of eight


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("delta")
    for family in FAMILIES:
        tiny_model(family, **LINEAR_ATTENTION).to(torch.bfloat16).save_pretrained(root / family)
    return {
        family: quantize(root / family, root / f"{family}-store", codec="int8", dense_codec="int8")
        for family in FAMILIES
    }


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each pass through a plan of one span has."""

    def is_one_span(plan: PassPlan) -> None:
        assert [type(stage) for stage in plan.stages] == [LayerSpan]

    return rows_of_calls(monkeypatch, PassPlan, check=is_one_span)


def kinds(model: Any) -> list[str]:
    return [layer.kind for layer in model.fast_path.layers]


def num_fused(hf: Any) -> int:
    return sum(isinstance(vars(module).get("forward"), DeltaForward) for module in hf.modules())


def output_projections(hf: Any) -> list[Any]:
    found = [module for name, module in hf.named_modules() if name.endswith("linear_attn.out_proj")]
    assert found
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_give_the_modules_logits(family: str, stores: dict[str, Path], passes: list[int]) -> None:
    with open_model(stores[family]) as fast, open_model(stores[family], fast_path=False) as plain:
        assert kinds(fast) == ["span"] * 4
        assert num_fused(fast.hf) == 3
        assert num_fused(plain.hf) == 0
        assert all(isinstance(linear, QuantLinear) for linear in output_projections(fast.hf))
        got, expected = logits(fast.hf, NUM_STEPS + 1), logits(plain.hf, NUM_STEPS + 1)
    assert passes == [1] * NUM_STEPS
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert (got - expected).norm() <= 1e-2 * expected.norm()
    assert len(set(got.argmax(-1).flatten().tolist())) > 2


@pytest.mark.parametrize(("family", "num_slots"), [("qwen3_next", 2), ("qwen3_5_moe_text", 7)])
def test_few_slots_change_no_bit(family: str, num_slots: int, stores: dict[str, Path], passes: list[int]) -> None:
    found = []
    for number in (num_slots, 32):
        with open_model(stores[family], num_slots=number) as model:
            found.append(logits(model.hf, NUM_STEPS + 1))
    assert passes == [1] * NUM_STEPS * 2
    assert torch.equal(*found)


def states_of(layer: Any) -> list[Tensor]:
    return [layer.conv_states[0], layer.recurrent_states[0]]


@torch.inference_mode()
def after_prompt(hf: Any, length: int = 9, batch: int = 1) -> Any:
    ids, mask = tiny_prompt(batch, length)
    cache = DynamicCache(config=hf.config)
    hf(ids, attention_mask=mask, **with_cache(cache), use_cache=True)
    return cache


def test_calls_that_states_do_not_allow_take_the_modules(stores: dict[str, Path], passes: list[int]) -> None:
    """Of a prompt, of a batch, a first token, states that are recorded."""
    found = []
    for fast_path in (True, False):
        with open_model(stores["qwen3_next"], fast_path=fast_path) as model, torch.inference_mode():
            hf = model.hf
            recorded = after_prompt(hf)
            recorded.activate_past_recording()
            calls = [
                (torch.tensor([[5, 6, 7] * 3]), after_prompt(hf)),
                (torch.tensor([[5], [6]]), after_prompt(hf, batch=2)),
                (torch.tensor([[5]]), DynamicCache(config=hf.config)),
                (torch.tensor([[5]]), recorded),
            ]
            found += [[hf(ids, **with_cache(cache), use_cache=True).logits for ids, cache in calls]]
            assert not passes
            hf(torch.tensor([[5]]), **with_cache(calls[0][1]), use_cache=True)
            assert passes == [1] * fast_path
            passes.clear()
    for got, expected in zip(*found, strict=True):
        assert expected.abs().max() > 0.1
        assert (got - expected).norm() <= 1e-2 * expected.norm()


def test_tokens_of_several_sequences_pass_together(stores: dict[str, Path], passes: list[int]) -> None:
    with open_model(stores["qwen3_next"]) as model, torch.inference_mode():
        hf = model.hf
        lengths = (4, 9, 6)
        ids = [torch.tensor([token]) for token in (5, 6, 7)]
        caches, others = ([after_prompt(hf, length) for length in lengths] for _ in range(2))
        got = pass_rows(hf, list(zip(ids, caches, strict=True)))
        assert got is not None
        decoder = hf.get_decoder()
        for row, token, cache in zip(got, ids, others, strict=True):
            alone = decoder(input_ids=token[None], **with_cache(cache), use_cache=True).last_hidden_state
            assert torch.equal(row, alone[0, 0])
        assert passes == [3, 1, 1, 1]


def test_a_shared_pass_that_fails_moves_no_state_on(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    tokens, call = [5, 6, 7], PassPlan.__call__

    def fail_at_the_end(self: PassPlan, *args: Any) -> None:
        call(self, *args)
        raise TransferError("an expert cannot be read")

    with open_model(stores["qwen3_next"]) as model, torch.inference_mode():
        hf = model.hf
        caches, others = ([after_prompt(hf, length) for length in (4, 9, 6)] for _ in range(2))
        before = [contents(cache) for cache in caches]
        for is_failing in (True, False, True):
            with monkeypatch.context() as patch:
                if is_failing:
                    patch.setattr(PassPlan, "__call__", fail_at_the_end)
                    with pytest.raises(TransferError):
                        next_logits(hf, tokens, caches)
                else:
                    got = next_logits(hf, tokens, caches)
                    expected = [
                        hf(torch.tensor([[token]]), **with_cache(cache), use_cache=True).logits[0, 0]
                        for token, cache in zip(tokens, others, strict=True)
                    ]
                    assert torch.equal(got, torch.stack(expected))
                    before = [contents(cache) for cache in others]
            for cache, theirs in zip(caches, before, strict=True):
                for mine, each in zip(contents(cache), theirs, strict=True):
                    assert all(map(torch.equal, mine, each))


def test_tokens_of_a_sequence_pass_in_place(stores: dict[str, Path], passes: list[int]) -> None:
    """Of a short message, say, of which none is taken back: the memory of the states is what it was."""
    with open_model(stores["qwen3_next"]) as model, torch.inference_mode():
        hf, ids = model.hf, torch.tensor([[5, 6, 7, 5, 9]])
        together, alone = after_prompt(hf), after_prompt(hf)
        places = [part.data_ptr() for layer in together.layers[:3] for part in states_of(layer)]
        got = hf(ids, **with_cache(together), use_cache=True).logits[0]
        expected = torch.cat([hf(each, **with_cache(alone), use_cache=True).logits[0] for each in ids.split(1, 1)])
        assert torch.equal(got, expected)
        assert passes == [5] + [1] * 5
        assert [part.data_ptr() for layer in together.layers[:3] for part in states_of(layer)] == places
        for mine, theirs in zip(contents(together), contents(alone), strict=True):
            assert all(map(torch.equal, mine, theirs))


def test_the_plan_counts_the_states_that_passes_keep(stores: dict[str, Path]) -> None:
    """So many as a pass of eight rows keeps, or the one behind which a pass is shared."""
    sizes: dict[str, Any] = {"context": 512, "ram": "2GiB"}
    parts = []
    for choice in ("off", "auto"):
        with load(stores["qwen3_next"], speculate=choice, **sizes) as model, torch.inference_mode():
            parts.append({part.name: part.num_bytes for part in model.placement.ram.fixed}["key/value cache"])
            cache = after_prompt(model.hf)
            keep_next(cache)
            model.hf(torch.tensor([[5] * MAX_ROWS]), **with_cache(cache), use_cache=True)
            present = sum(part.nbytes for layer in cache.layers[:3] for part in states_of(layer))
            kept = sum(ring.nbytes for layer in cache.layers[:3] for ring in layer.rings)
    assert kept == (MAX_ROWS + 1) * present
    assert parts[1] - parts[0] == (MAX_ROWS - 1) * present
    planned = make_plan(stores["qwen3_next"], Machine(ram_bytes=2 << 30), context=512)
    assert {part.name: part.num_bytes for part in planned.placement.ram.fixed}["key/value cache"] == parts[1]
    machine = Machine(ram_bytes=2 << 30, vram_bytes=4 << 30)
    plans = [make_plan(stores["qwen3_next"], machine, context=512, device_pass=has_pass) for has_pass in (False, True)]
    caches = []
    for plan in plans:
        assert plan.placement.vram is not None
        caches += [part.num_bytes for part in plan.placement.vram.fixed if part.name == "key/value cache"]
    assert caches[1] - caches[0] == MAX_ROWS * present  # in fp32 beside a model in bf16, too


def test_a_copied_cache_has_the_present_states_alone(stores: dict[str, Path]) -> None:
    with open_model(stores["qwen3_next"]) as model, torch.inference_mode():
        hf, cache = model.hf, after_prompt(model.hf)
        assert not why_no_rows(hf)
        assert takes_rows(hf, cache, 4)
        keep_next(cache)
        hf(torch.tensor([[5, 6, 7, 8]]), **with_cache(cache), use_cache=True)
        roll_back(cache, 3)
        twin = copy.deepcopy(cache)
        for mine, theirs in zip(contents(twin), contents(cache), strict=True):
            assert all(map(torch.equal, mine, theirs))
        storages = [part.untyped_storage().nbytes() for layer in twin.layers[:3] for part in states_of(layer)]
        assert storages == [part.nbytes for layer in cache.layers[:3] for part in states_of(layer)]
        follow = [hf(torch.tensor([[9]]), **with_cache(each), use_cache=True).logits for each in (cache, twin)]
        assert torch.equal(*follow)


def test_linear_attention_without_a_kernel_is_called_as_a_module(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_model(stores["qwen3_next"]) as model:
        expected = logits(model.hf, NUM_STEPS + 1)

    def refuse_the_second(module: Any) -> Any:
        if module.layer_idx == 1:
            raise Uncovered("what a test says")
        return delta_step(module)

    monkeypatch.setattr("offload_moe.decode.layer.delta_step", refuse_the_second)
    with open_model(stores["qwen3_next"]) as model:
        assert kinds(model) == ["span", "modules", "span", "span"]
        got = logits(model.hf, NUM_STEPS + 1)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert (got - expected).norm() <= 1e-2 * expected.norm()


def test_sizes_that_no_rule_is_computed_in_are_modules_beside_native_attention(tmp_path: Path) -> None:
    tiny_model("qwen3_next", **LINEAR_ATTENTION | {"linear_key_head_dim": 8}).to(torch.bfloat16).save_pretrained(
        tmp_path / "plain"
    )
    store = quantize(tmp_path / "plain", tmp_path / "store", codec="int8", dense_codec="int8")
    with open_model(store) as fast, open_model(store, fast_path=False) as plain:
        assert kinds(fast) == ["modules", "modules", "modules", "span"]
        assert "whose rule is not a kernel call" in str(fast.fast_path)
        got, expected = logits(fast.hf, NUM_STEPS + 1), logits(plain.hf, NUM_STEPS + 1)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


class Calling(ModelHook):  # type: ignore[misc]
    """A hook of accelerate that notes each call."""

    def __init__(self, called: list[int]) -> None:
        self.called = called

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.called.append(1)
        return args, kwargs


def hooked(module: Any, called: list[int]) -> Callable[[], None]:
    handle = module.register_forward_hook(lambda *_: called.append(1))
    return cast(Callable[[], None], handle.remove)


def replaced(module: Any, called: list[int]) -> Callable[[], None]:
    own = module.forward
    module.forward = lambda *args: (called.append(1), own(*args))[1]
    return partial(setattr, module, "forward", own)


def hooked_by_accelerate(module: Any, called: list[int]) -> Callable[[], None]:
    add_hook_to_module(module, Calling(called))
    return partial(remove_hook_from_module, module)


@pytest.mark.parametrize(
    ("name", "change"),
    [("norm", hooked), ("norm", replaced), ("norm", hooked_by_accelerate), ("conv1d", hooked_by_accelerate)],
)
def test_a_step_calls_what_hooks_are_on(name: str, change: Any, stores: dict[str, Path], passes: list[int]) -> None:
    """And is native again without them."""
    with open_model(stores["qwen3_next"]) as model:
        expected, called = logits(model.hf, 3), list[int]()
        undo = change(model.hf.model.layers[0].linear_attn.get_submodule(name), called)
        passes.clear()
        got = logits(model.hf, 3)
        assert not passes
        assert len(called) == 3  # the prompt and two steps
        assert (got - expected).norm() <= 1e-2 * expected.norm()
        undo()
        assert torch.equal(logits(model.hf, 3), expected)
        assert len(called) == 3
        assert passes == [1, 1]


@pytest.mark.parametrize(("name", "error"), [("DeltaKernel", AttributeError), ("Projected", TypeError)])
def test_an_error_of_our_own_is_no_refusal(name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Mock(side_effect=error("a fault of ours")) if error is AttributeError else None
    monkeypatch.setattr(f"offload_moe.decode.delta.{name}", fault)
    with pytest.raises(error):
        fuse_delta_rules(tiny_model("qwen3_next", **LINEAR_ATTENTION))


@pytest.mark.parametrize(("path", "name"), [("norm", "variance_epsilon"), ("", "head_k_dim"), ("", "in_proj_ba")])
def test_a_layer_with_other_parts_keeps_its_forward(path: str, name: str) -> None:
    hf: Any = tiny_model("qwen3_next", **LINEAR_ATTENTION)
    delattr(hf.model.layers[1].linear_attn.get_submodule(path), name)
    assert fuse_delta_rules(hf) == 2


def test_a_lossless_store_keeps_the_modules_bits(tmp_path: Path) -> None:
    tiny_model("qwen3_next", **LINEAR_ATTENTION).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    store = quantize(tmp_path / "checkpoint", tmp_path / "store", codec="bf16", dense_codec="bf16")
    with open_model(store) as model:
        assert num_fused(model.hf) == 0
