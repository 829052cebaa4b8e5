"""Which calls of a decoder pass a plan, and which go through its modules: every one gives the modules' numbers."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from support.checkpoints import write_checkpoint
from support.models import open_model
from support.native_stores import LLAMA4
from support.tiny_models import tiny_model, tiny_prompt
from torch import Tensor
from transformers import DynamicCache, StaticCache

from offload_moe import load
from offload_moe.convert.quantize import quantize
from offload_moe.decode.forward import DecoderForward
from offload_moe.decode.plan import ModuleLayer, PassPlan
from offload_moe.decode.probe import Uncovered
from offload_moe.decode.wiring import wiring_of
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import CACHE, cache_from, with_cache
from tests.support.passes import rows_of_calls

NUM_PROMPT, NUM_NEW = 9, 6
ALL_PASSES = [NUM_PROMPT, *[1] * (NUM_NEW - 1)]
ROUNDING = 5e-2  # int8 activations: a last bit before them may round one of them the other way


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seam")
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(root / "checkpoint")
    return quantize(root / "checkpoint", root / "store", codec="nf4")


@pytest.fixture
def model(store: Path) -> Iterator[Model]:
    with open_model(store) as opened:
        yield opened


@pytest.fixture
def plain(store: Path) -> Iterator[Model]:
    with open_model(store, fast_path=False) as opened:
        yield opened


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every pass of a plan."""
    return rows_of_calls(monkeypatch, PassPlan)


def prompt(batch: int = 1) -> dict[str, Tensor]:
    ids, mask = tiny_prompt(batch, NUM_PROMPT)
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Model, batch: int = 1, **settings: Any) -> Any:
    return model.hf.generate(
        **prompt(batch),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=None,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


def distance(got: Tensor, expected: Tensor) -> float:
    assert expected.abs().max() > 0.1
    return float((got - expected).norm() / expected.norm())


def test_a_prompt_and_every_step_of_one_sequence_pass(model: Model, plain: Model, passes: list[int]) -> None:
    got, expected = generated(model), generated(plain)
    assert passes == ALL_PASSES
    assert distance(torch.stack(got.logits), torch.stack(expected.logits)) < ROUNDING


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 3},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"output_attentions": True},
        {"use_cache": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_ways_to_generate_take_the_modules(
    settings: dict[str, Any], model: Model, plain: Model, passes: list[int]
) -> None:
    got, expected = generated(model, **settings), generated(plain, **settings)
    assert not passes
    assert torch.equal(got.sequences, expected.sequences)
    assert distance(torch.stack(got.logits), torch.stack(expected.logits)) < ROUNDING


@torch.inference_mode()
def after_prompt(model: Model, cache: Any = None, batch: int = 1) -> Any:
    cache = DynamicCache(config=model.hf.config) if cache is None else cache
    return cache_from(model.hf(**prompt(batch), **with_cache(cache), use_cache=True))


def one_more(**settings: Any) -> Callable[[Model], Tensor]:
    """Logits of one step behind a prompt."""

    def step(model: Model) -> Tensor:
        with torch.inference_mode():
            cache = after_prompt(model)
            logits: Tensor = model.hf(**with_cache(cache), use_cache=True, **settings).logits
        assert cache.get_seq_length() == NUM_PROMPT + settings["input_ids"].shape[1]
        return logits

    return step


TOKEN = torch.tensor([[5]])
SEEN = torch.ones(1, NUM_PROMPT + 1, dtype=torch.int64)
PADDED = torch.tensor([[0, 0, *[1] * (NUM_PROMPT - 1)]])


@pytest.mark.parametrize(
    ("settings", "num_passes"),
    [
        ({}, 1),
        ({"attention_mask": SEEN}, 1),
        ({"attention_mask": SEEN.bool()}, 1),
        ({"position_ids": torch.tensor([[NUM_PROMPT]])}, 1),
        ({"position_ids": torch.tensor([[NUM_PROMPT + 3]])}, 1),
        ({"output_hidden_states": False, "output_router_logits": None}, 1),
        ({"attention_mask": PADDED}, 0),
        ({"attention_mask": torch.zeros(1, 1, 1, NUM_PROMPT + 1)}, 0),
        ({"output_hidden_states": True}, 0),
        ({"input_ids": torch.tensor([[5, 6]])}, 1),
        ({"input_ids": torch.arange(8)[None]}, 1),
        ({"input_ids": torch.arange(9)[None]}, 1),
        ({"input_ids": torch.arange(60)[None]}, 1),
        ({"return_dict": False}, 1),  # the head makes a tuple of what the decoder returns
    ],
)
def test_a_step_passes_where_nothing_else_is_asked_of_it(
    settings: dict[str, Any], num_passes: int, model: Model, plain: Model, passes: list[int]
) -> None:
    settings = {"input_ids": TOKEN, **settings}
    if settings.get("return_dict") is False:
        with torch.inference_mode():
            got, expected = (
                each.hf(**with_cache(after_prompt(each)), use_cache=True, **settings)[0] for each in (model, plain)
            )
    else:
        got, expected = (one_more(**settings)(each) for each in (model, plain))
    assert passes == [NUM_PROMPT, *[settings["input_ids"].shape[1]] * num_passes]
    assert distance(got, expected) < ROUNDING


def test_embeddings_in_place_of_a_token_pass(model: Model, passes: list[int]) -> None:
    expected = one_more(input_ids=TOKEN)(model)
    with torch.inference_mode():
        embedded = model.hf.get_input_embeddings()(TOKEN)
        got = model.hf(inputs_embeds=embedded, **with_cache(after_prompt(model)), use_cache=True).logits
    assert torch.equal(got, expected)
    assert passes == [NUM_PROMPT, 1, NUM_PROMPT, 1]


def test_embeddings_that_were_given_stay_as_they_are(model: Model) -> None:
    with torch.inference_mode():
        embedded = model.hf.get_input_embeddings()(TOKEN)
        before = embedded.clone()
        model.hf(inputs_embeds=embedded, **with_cache(after_prompt(model)), use_cache=True)
    assert torch.equal(embedded, before)


@pytest.mark.parametrize("name", ["embed_tokens", "rotary_emb", "norm"])
def test_hooks_on_the_modules_around_the_layers_are_called(name: str, model: Model, passes: list[int]) -> None:
    expected, called = one_more(input_ids=TOKEN)(model), []
    assert passes == [NUM_PROMPT, 1]
    handle = getattr(model.hf.model, name).register_forward_hook(lambda *_: called.append(1))
    got = one_more(input_ids=TOKEN)(model)
    assert (len(called), len(passes)) == (2, 2)  # the prompt and the step
    assert distance(got, expected) < ROUNDING
    handle.remove()
    assert torch.equal(one_more(input_ids=TOKEN)(model), expected)
    assert len(passes) == 4


def test_a_forward_that_appears_between_two_tokens_is_called(model: Model, passes: list[int]) -> None:
    expected, called = one_more(input_ids=TOKEN)(model), []
    block = model.hf.model.layers[1].mlp
    forward = block.forward
    block.forward = lambda x: (called.append(1), forward(x))[1]
    got = one_more(input_ids=TOKEN)(model)
    assert (len(called), len(passes)) == (2, 2)
    assert distance(got, expected) < ROUNDING
    del block.forward
    assert torch.equal(one_more(input_ids=TOKEN)(model), expected)
    assert len(passes) == 4


class Counting(ModelHook):  # type: ignore[misc]
    """A hook of accelerate that counts the calls of its module."""

    def __init__(self) -> None:
        self.num_calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return args, kwargs


@pytest.mark.parametrize("name", ["norm", "layers.1.mlp", "layers.2.self_attn.q_proj"])
def test_hooks_of_accelerate_are_called_until_they_are_removed(name: str, model: Model, passes: list[int]) -> None:
    expected, hook = one_more(input_ids=TOKEN)(model), Counting()
    module = model.hf.model.get_submodule(name)
    add_hook_to_module(module, hook)
    got = one_more(input_ids=TOKEN)(model)
    assert (hook.num_calls, len(passes)) == (2, 2)  # the prompt and the step
    assert distance(got, expected) < ROUNDING
    remove_hook_from_module(module)
    assert torch.equal(one_more(input_ids=TOKEN)(model), expected)
    assert (hook.num_calls, len(passes)) == (2, 4)


def test_a_forward_that_was_put_back_is_the_modules_own(model: Model, passes: list[int]) -> None:
    """As a bound method in an attribute, which was not there before; that of another module is not."""
    expected = one_more(input_ids=TOKEN)(model)
    first, second = model.hf.model.layers[1:]
    own = first.forward
    for forward, num_passes in ((lambda *args, **kwargs: own(*args, **kwargs), 0), (own, 2), (second.forward, 0)):
        passes.clear()
        first.forward = forward
        got = one_more(input_ids=TOKEN)(model)
        assert len(passes) == num_passes
        assert (distance(got, expected) < ROUNDING) is (forward != second.forward)


def test_a_decoder_returns_what_its_own_forward_returns(model: Model, plain: Model, passes: list[int]) -> None:
    """Of the same class, with the same fields."""
    outputs = []
    for each in (model, plain):
        with torch.inference_mode():
            cache = after_prompt(each)
            outputs.append(each.hf.model(input_ids=TOKEN, **with_cache(cache), use_cache=True))
        assert cache_from(outputs[-1]) is cache
    got, expected = outputs
    assert passes == [NUM_PROMPT, 1]
    assert type(got) is type(expected)
    assert list(got) == list(expected) == ["last_hidden_state", CACHE]
    assert distance(got.last_hidden_state, expected.last_hidden_state) < ROUNDING
    assert got[0] is got["last_hidden_state"] is got.to_tuple()[0] is got.last_hidden_state
    assert got.hidden_states is None
    assert repr(got).startswith(type(expected).__name__)


def test_both_or_none_of_token_and_embeddings_is_transformers_own_error(model: Model, passes: list[int]) -> None:
    cache = after_prompt(model)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model.hf.model(**with_cache(cache), use_cache=True)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model.hf.model(input_ids=TOKEN, inputs_embeds=torch.ones(1, 1, 64), **with_cache(cache), use_cache=True)
    assert passes == [NUM_PROMPT]


def test_a_gradient_goes_through_the_modules(model: Model, plain: Model, passes: list[int]) -> None:
    got, expected = [], []
    for each, result in ((model, got), (plain, expected)):
        embedded = each.hf.get_input_embeddings()(TOKEN).detach().clone().requires_grad_()
        with torch.no_grad():
            cache = cache_from(each.hf(**prompt(), use_cache=True))
        try:
            logits = each.hf(inputs_embeds=embedded, **with_cache(cache), use_cache=True).logits
        except RuntimeError as error:  # kernels have no backward
            result.append(type(error))
        else:
            result.append(logits.requires_grad)
    assert not passes
    assert got == expected


def test_tokens_without_a_cache_take_the_modules(model: Model, passes: list[int]) -> None:
    """They make one that has not rounded anything."""
    with torch.inference_mode():
        out = model.hf(input_ids=TOKEN, use_cache=True)
        assert not passes
        model.hf(input_ids=TOKEN, **with_cache(cache_from(out)), use_cache=True)
    assert len(passes) == 1


def test_a_static_cache_takes_the_modules(model: Model, passes: list[int]) -> None:
    cache = after_prompt(model, StaticCache(config=model.hf.config, max_cache_len=32))
    with torch.inference_mode():
        model.hf(input_ids=TOKEN, **with_cache(cache), use_cache=True)
    assert not passes


def test_assisted_generation_gives_the_tokens_of_greedy(model: Model, store: Path, passes: list[int]) -> None:
    """Its steps are longer than a token where the assistant guesses, and caches are cropped between them."""
    expected = generated(model).sequences
    with open_model(store) as assistant:
        got = generated(model, assistant_model=assistant.hf).sequences
    assert torch.equal(got, expected)
    assert passes


def test_a_hook_that_comes_between_two_tokens_is_called(
    model: Model, passes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    expected = generated(model, max_length=None)
    passes.clear()
    called: list[int] = []
    handles: list[Any] = []

    def appear(hf: Any, *_: Any) -> None:
        called.append(0)
        if len(called) == 3:  # the prompt, and one step
            handles.append(hf.model.layers[1].mlp.register_forward_hook(lambda *_: called.append(1)))

    handles.append(model.hf.register_forward_pre_hook(appear))
    with caplog.at_level(logging.WARNING, "offload_moe"):
        got = generated(model)
    assert called.count(1) == NUM_NEW - 2
    assert passes == [NUM_PROMPT, 1]
    assert distance(torch.stack(got.logits), torch.stack(expected.logits)) < ROUNDING
    said = [record.getMessage() for record in caplog.records if "module by module" in record.getMessage()]
    assert len(said) == 1
    assert "layers.1.mlp" in said[0]
    for handle in handles:
        handle.remove()
    passes.clear()
    assert torch.equal(torch.stack(generated(model).logits), torch.stack(expected.logits))
    assert passes == ALL_PASSES


def test_another_attention_function_takes_the_modules(model: Model, plain: Model, passes: list[int]) -> None:
    for each in (model, plain):
        each.hf.set_attn_implementation("eager")
    got, expected = generated(model), generated(plain)
    assert not passes
    assert distance(torch.stack(got.logits), torch.stack(expected.logits)) < ROUNDING


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("granitemoe", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4}),
        ("ernie4_5_moe", {}),
        (
            "exaone_moe",
            {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ),
        ("dots1", {"first_k_dense_replace": 1}),
        ("minimax_m2", {}),
        ("hunyuan_v1_moe", {}),
        ("olmoe", {}),
        ("phimoe", {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2}),
        ("gpt_oss", {}),
        ("deepseek_v2", {"q_lora_rank": None, "qk_rope_head_dim": 16}),
        ("deepseek_v3", {"qk_rope_head_dim": 16, "attention_bias": True}),
        ("glm4_moe_lite", {"qk_rope_head_dim": 16}),
        ("llama4_text", LLAMA4 | {"attention_chunk_size": 6, "num_experts_per_tok": 2}),
    ],
)
def test_families_with_a_plan_give_the_numbers_of_their_modules(
    family: str, changes: dict[str, Any], tmp_path: Path, passes: list[int]
) -> None:
    write_checkpoint(tmp_path / "checkpoint", family, **{"head_dim": 16, "hidden_size": 64} | changes)
    quantize(tmp_path / "checkpoint", tmp_path / "store")
    ids = torch.arange(3, 3 + NUM_PROMPT)[None]
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    logits = []
    for is_fast in (True, False):
        with load(tmp_path / "store", fast_path=is_fast) as model:
            out = model.hf.generate(ids, output_logits=True, return_dict_in_generate=True, **settings)
            logits.append(torch.stack(out.logits))
        if is_fast:
            assert model.fast_path is not None
            assert [layer.kind for layer in model.fast_path.layers][1:] == ["span"] * 2
    assert passes == ALL_PASSES
    assert distance(*logits) < ROUNDING


def test_layers_that_are_not_native_are_called_as_modules(store: Path, passes: list[int], monkeypatch: Any) -> None:
    """A plan of a module between native layers."""
    with open_model(store) as model:
        expected = generated(model)
    from offload_moe.decode import plan

    init = plan.NativeLayer.__init__

    def refuse_the_second(self: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        if layer.self_attn.layer_idx == 1:
            raise Uncovered("what a test says")
        init(self, layer, *args, **kwargs)

    monkeypatch.setattr(plan.NativeLayer, "__init__", refuse_the_second)
    with open_model(store) as model:
        assert model.fast_path is not None
        assert [layer.kind for layer in model.fast_path.layers] == ["span", "modules", "span"]
        forward = model.hf.model.forward
        assert isinstance(forward, DecoderForward)
        assert isinstance(forward.plan.stages[1], ModuleLayer)
        passes.clear()
        got = generated(model)
        assert len(passes) == NUM_NEW - 1
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


def test_a_decoder_that_does_more_has_no_plan() -> None:
    decoder: Any = tiny_model("qwen3_moe").model
    assert wiring_of(decoder).scale == 1.0
    forward = decoder.forward

    def scaled(**kwargs: Any) -> Any:
        embedded = decoder.embed_tokens(kwargs.pop("input_ids")) * 2
        return forward(inputs_embeds=embedded, **kwargs)

    def normed_twice(**kwargs: Any) -> Any:
        out = forward(**kwargs)
        out.last_hidden_state = decoder.norm(out.last_hidden_state)
        return out

    def shifted(**kwargs: Any) -> Any:
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return forward(**kwargs)

    def without_a_layer(**kwargs: Any) -> Any:
        layers, decoder.layers = decoder.layers, decoder.layers[:-1]
        try:
            return forward(**kwargs)
        finally:
            decoder.layers = layers

    reasons = []
    for change in (scaled, normed_twice, shifted, without_a_layer):
        decoder.forward = change
        with pytest.raises(Uncovered) as refused:
            wiring_of(decoder)
        reasons.append(str(refused.value))
        assert all("forward" not in vars(layer) for layer in decoder.layers)
    assert reasons == [
        "a decoder that changes what its layers give",
        "a decoder that changes what its norm gives",
        "a decoder whose layers are rotated differently",
        "a decoder that changes what its layers give",
    ]
