"""Token streams: the same tokens as generate(), stopped at once, errors and randomness where they belong."""

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from offload_moe.chat.prompt import generate, stream, stream_tokens
from offload_moe.chat.sampling import Sampling
from offload_moe.errors import ConfigError
from tests.support.chat import END_OF_TEXT, Scripted, byte_tokenizer, chat_model, ids_of


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return chat_model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_tokens_are_those_of_generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = torch.tensor([ids_of(tokenizer, "hello there")])
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, disable_compile=True)[0, prompt.shape[1] :]
    with stream_tokens(model, tokenizer, prompt, max_new_tokens=12, temperature=0) as tokens:
        assert list(tokens) == expected.tolist()
    assert tokens.prompt_s > 0
    assert tokens.decode_s > 0
    assert list(tokens) == []


def test_a_seed_repeats_and_leaves_the_callers_random_state(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    runs = [
        generate(model, tokenizer, "hi", temperature=2.0, top_k=0, seed=seed, max_new_tokens=20) for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_closing_in_another_thread_stops_before_the_next_layer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    computed = []
    tokens = stream_tokens(model, tokenizer, torch.tensor([[1, 2, 3]]), max_new_tokens=1000)

    def close(*_: object) -> None:
        computed.append(1)
        closer = threading.Thread(target=tokens.close)
        closer.start()
        closer.join(60)

    layers = [layer.register_forward_hook(close) for layer in model.model.layers]
    assert list(tokens) == []
    for handle in layers:
        handle.remove()
    assert len(computed) == 1
    assert tokens.interrupted_forward
    assert not model.model.layers[0]._forward_pre_hooks


def test_a_cache_is_freed_with_its_last_holder(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    is_alive = weakref.ref(cache)
    gc.disable()
    try:
        with stream_tokens(model, None, torch.arange(1, 9)[None], cache=cache, max_new_tokens=3) as tokens:
            assert len(list(tokens)) == 3
        del cache
        assert is_alive() is None
    finally:
        gc.enable()


def test_a_stop_event_ends_the_stream(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    stop = threading.Event()
    with stream_tokens(model, tokenizer, torch.tensor([[1]]), max_new_tokens=400, stop_event=stop) as tokens:
        next(tokens)
        stop.set()
        assert list(tokens) == []
        assert not tokens.interrupted_forward


def test_nothing_is_computed_before_it_is_wanted(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    pieces = stream(model, tokenizer, "hello", max_new_tokens=400, seed=0)
    assert not forwards
    next(pieces)
    pieces.close()
    handle.remove()
    assert 1 <= len(forwards) <= 4


def test_an_error_in_a_step_reaches_the_consumer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk on fire")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        with (
            stream_tokens(model, tokenizer, torch.tensor([[1]])) as tokens,
            pytest.raises(RuntimeError, match="on fire"),
        ):
            next(tokens)
    finally:
        handle.remove()


def test_stop_tokens_end_the_text_and_never_show(tokenizer: PreTrainedTokenizerFast) -> None:
    for stop in ("<|endoftext|>", "<|im_end|>", "<|im_start|>"):
        model = chat_model()
        Scripted(model, [*ids_of(tokenizer, " añb"), *ids_of(tokenizer, stop), *ids_of(tokenizer, "user")])
        assert generate(model, tokenizer, "hello", max_new_tokens=50) == "añb"


def test_text_comes_whole_characters_at_a_time(tokenizer: PreTrainedTokenizerFast) -> None:
    model = chat_model()
    Scripted(model, [*ids_of(tokenizer, "né 🙂!"), END_OF_TEXT])
    assert list(stream(model, tokenizer, "x")) == ["n", "é", " ", "🙂", "!"]


def test_invalid_bytes_do_not_hold_the_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    model = chat_model()
    broken = ids_of(tokenizer, "🙂")[:1]
    Scripted(model, [*broken * 6, *ids_of(tokenizer, "ok"), END_OF_TEXT])
    pieces = list(stream(model, tokenizer, "x"))
    assert pieces[0].strip("\ufffd") == ""
    assert "".join(pieces).strip("\ufffd") == "ok"


def test_raw_continues_the_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = torch.tensor([ids_of(tokenizer, "Once upon")])
    expected = model.generate(prompt, max_new_tokens=9, do_sample=False, disable_compile=True)[0, prompt.shape[1] :]
    text = generate(model, tokenizer, "Once upon", raw=True, temperature=0, max_new_tokens=9)
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_models_own_sampling_is_the_default() -> None:
    model = chat_model()
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=9)
    config = Sampling(top_p=0.5).generation_config(model, stop_ids=[3, 1], max_new_tokens=5)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.7, 9, 0.5)
    assert (config.eos_token_id, config.max_new_tokens, config.disable_compile) == ([1, 3], 5, True)
    assert Sampling(temperature=0).generation_config(model, stop_ids=[], max_new_tokens=5).do_sample is False
    assert Sampling(top_k=4).generation_config(chat_model(), stop_ids=[], max_new_tokens=5).do_sample is True


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-300},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": 2**31},
        {"top_p": float("nan")},
        {"seed": -4},
        {"seed": 2**64},
        {"seed": 10**5000},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"warmth": 1},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling.of(settings)


@pytest.mark.parametrize("settings", [{"temperature": 2}, {"temperature": 1e-6}, {"top_p": 1}, {"seed": 2**64 - 1}])
def test_the_ends_of_the_ranges_work(settings: dict[str, Any]) -> None:
    settings = {"temperature": 1.0, "seed": 3} | settings
    assert len(generate(chat_model(), byte_tokenizer(), "hi", max_new_tokens=6, **settings)) > 0


def test_a_seed_out_of_range_says_the_range() -> None:
    with pytest.raises(ConfigError, match=r"seed is 18446744073709551616.*from 0 to 18446744073709551615"):
        generate(chat_model(), byte_tokenizer(), "hi", seed=2**64)


def test_an_encoder_decoder_streams_too() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    prompt = torch.tensor([[5, 6, 7]])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 1:]
    with stream_tokens(model, None, prompt, max_new_tokens=6, temperature=0) as tokens:
        assert list(tokens) == expected.tolist()
