"""Our own step loop: generate()'s tokens for every setting and kind of model, turns, and interrupts."""

import signal
import threading
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from offload_moe.chat import prompt_chunks
from offload_moe.chat.stream import TokenStream
from offload_moe.errors import ConfigError
from offload_moe.families.cache_name import with_cache
from tests.support.chat import byte_tokenizer, chat_model

PROMPT = torch.tensor([[72, 101, 108, 108, 111, 32, 72, 101, 108, 108, 111]])
SAMPLED = {"do_sample": True, "temperature": 1.7, "top_k": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "top-k": SAMPLED | {"top_k": 7},
    "top-p": SAMPLED | {"top_p": 0.8},
    "min-p": SAMPLED | {"min_p": 0.05},
    "typical-p": SAMPLED | {"typical_p": 0.7},
    "cutoffs": SAMPLED | {"epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    "repetition penalty": {"repetition_penalty": 1.6},
    "penalty and sampled": SAMPLED | {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2},
    "n-grams": {"no_repeat_ngram_size": 1},
    "least length": {"min_new_tokens": 9, "eos_token_id": list(range(0, 264, 2))},
    "several ends": {"eos_token_id": list(range(0, 264, 3))},
    "forbidden": {"suppress_tokens": list(range(100)), "bad_words_ids": [[120], [121, 122]]},
    "forced end": {"forced_eos_token_id": 5, "eos_token_id": 5},
    "longer ends": SAMPLED | {"exponential_decay_length_penalty": (4, 3.0), "eos_token_id": 9},
    "guidance": {"guidance_scale": 1.5},
}
FAMILIES = {
    "llama": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {},  # sliding windows
    "qwen3_next": {},  # linear attention
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # prepares its inputs itself
    "granitemoehybrid": {  # recurrent layers
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
    "deepseek_v3": {  # latent attention
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}


def config_of(model: PreTrainedModel, **settings: Any) -> GenerationConfig:
    defaults = {"max_new_tokens": 14, "disable_compile": True, "do_sample": False, "pad_token_id": 0}
    return GenerationConfig(**(defaults | settings))


def expected(model: PreTrainedModel, config: GenerationConfig, prompt: torch.Tensor = PROMPT, **more: Any) -> list[int]:
    """New tokens of generate()."""
    torch.manual_seed(5)
    first = 1 if model.config.is_encoder_decoder else prompt.shape[1]
    return model.generate(prompt, generation_config=config, **more)[0, first:].tolist()


def tokens_of(model: PreTrainedModel, config: GenerationConfig, **more: Any) -> list[int]:
    with TokenStream(model, PROMPT, config, seed=5, **more) as stream:
        return list(stream)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return chat_model()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_gives_the_tokens_of_generate(llama: PreTrainedModel, name: str) -> None:
    config = config_of(llama, **SETTINGS[name])
    got = tokens_of(llama, config)
    assert got == expected(llama, config)
    if "end" not in name:
        assert len(set(got)) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_cache_gives_the_tokens_of_generate(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_chunks, "CPU_PROMPT_TOKENS", 4)
    model = chat_model(family, **FAMILIES[family])
    chunk = prompt_chunks.prompt_chunk_tokens(model)
    for settings in ({}, SAMPLED):
        config = config_of(model, **settings)
        assert tokens_of(model, config) == expected(model, config_of(model, **settings, prefill_chunk_size=chunk))


def test_stop_strings_end_as_in_generate(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    whole = tokens_of(llama, config_of(llama))
    character = next(text for token in whole[2:] if (text := tokenizer.decode([token])).isascii())
    monkeypatch.setattr(llama.generation_config, "stop_strings", ["never said"])
    config = config_of(llama, stop_strings=[character, "nor this"])
    got = tokens_of(llama, config, tokenizer=tokenizer)
    assert got == expected(llama, config, tokenizer=tokenizer)
    assert 2 < len(got) < len(whole)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        tokens_of(llama, config)


@pytest.mark.parametrize("settings", [{}, SAMPLED, {"forced_bos_token_id": 7, "encoder_no_repeat_ngram_size": 1}])
def test_an_encoder_decoder_gives_the_tokens_of_generate(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    config = config_of(model, **settings, decoder_start_token_id=0)
    got = tokens_of(model, config)
    assert got == expected(model, config)
    assert len(set(got)) > 1


def test_a_cache_is_continued(llama: PreTrainedModel) -> None:
    cache = DynamicCache(config=llama.config)
    llama(PROMPT[:, :6], **with_cache(cache))
    config = config_of(llama)
    assert tokens_of(llama, config, cache=cache) == expected(llama, config)
    with pytest.raises(ConfigError, match=r"holds 24 tokens and the sequence has 11"):
        tokens_of(llama, config, cache=cache)


def test_the_callers_random_numbers_go_on_where_no_seed_is_given(llama: PreTrainedModel) -> None:
    config = config_of(llama, **SAMPLED)
    torch.manual_seed(5)
    first, second = (list(TokenStream(llama, PROMPT, config)) for _ in range(2))
    torch.manual_seed(5)
    assert list(TokenStream(llama, PROMPT, config)) == first != second


def test_a_usual_step_is_one_short_call(llama: PreTrainedModel) -> None:
    seen: list[dict[str, Any]] = []
    handle = llama.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    tokens = tokens_of(llama, config_of(llama))
    handle.remove()
    for number, kwargs in enumerate(seen[1:]):
        assert kwargs["input_ids"].tolist() == [[tokens[number]]]
        assert kwargs["position_ids"].tolist() == [[PROMPT.shape[1] + number]]
        assert kwargs["attention_mask"] is None
    assert len(seen) == len(tokens) == 14


@pytest.mark.parametrize("settings", [{}, SAMPLED])
def test_streams_of_one_model_alternate(
    llama: PreTrainedModel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one thread, with prompts of several parts, and each with random numbers of its own."""
    monkeypatch.setattr(prompt_chunks, "CPU_PROMPT_TOKENS", 4)
    prompts = [PROMPT, PROMPT.flip(1), PROMPT[:, 3:]]
    config = config_of(llama, **settings)
    alone = [list(TokenStream(llama, prompt, config, seed=5)) for prompt in prompts]
    streams = [TokenStream(llama, prompt, config, seed=5) for prompt in prompts]
    assert [list(each) for each in zip(*zip(*streams, strict=True), strict=True)] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_threads_are_served_in_turn(llama: PreTrainedModel) -> None:
    """The prompt of one does not wait for the whole answer of another."""
    config = config_of(llama, max_new_tokens=40, eos_token_id=None)
    alone = tokens_of(llama, config)
    order: list[str] = []
    both_wait = threading.Barrier(2, timeout=60)
    answers: dict[str, list[int]] = {}

    def answer() -> None:
        name = threading.current_thread().name
        stream = TokenStream(llama, PROMPT, config, seed=5)
        first = next(stream)
        both_wait.wait()
        answers[name] = [first, *stream]

    handle = llama.register_forward_pre_hook(lambda *_: order.append(threading.current_thread().name))
    threads = [threading.Thread(target=answer, name=name) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    handle.remove()
    assert answers == {"a": alone, "b": alone}
    runs = [len(list(run)) for _, run in groupby(order)]
    assert len(runs) > 30
    assert max(runs) < 20


def at_forward(number: int, act: Callable[[], object]) -> Callable[..., None]:
    """A hook that acts in the forward of this number, from 0."""
    count = iter(range(1 << 20))
    return lambda *_: act() if next(count) == number else None


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_step(llama: PreTrainedModel) -> None:
    config, cache = config_of(llama), DynamicCache(config=llama.config)
    whole = tokens_of(llama, config)
    handle = llama.model.layers[0].register_forward_pre_hook(at_forward(3, interrupt))
    stream, seen = TokenStream(llama, PROMPT, config, cache=cache), []
    with pytest.raises(KeyboardInterrupt):
        seen += stream
    handle.remove()
    assert stream.tokens == whole[:4]
    assert not stream.interrupted_forward
    assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT.shape[1] + 3] * 2
    assert list(stream) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_ends_a_prompt_at_its_next_layer(llama: PreTrainedModel) -> None:
    layers: list[int] = []
    handles = [llama.model.layers[0].register_forward_hook(at_forward(0, interrupt))]
    handles += [layer.register_forward_hook(lambda *_: layers.append(1)) for layer in llama.model.layers]
    stream = TokenStream(llama, PROMPT, config_of(llama))
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    for handle in handles:
        handle.remove()
    assert len(layers) == 1
    assert stream.interrupted_forward


def test_a_second_interrupt_does_not_wait(llama: PreTrainedModel) -> None:
    def twice() -> None:
        interrupt()
        interrupt()
        raise AssertionError("it waited")

    handle = llama.model.layers[1].register_forward_pre_hook(at_forward(2, twice))
    stream = TokenStream(llama, PROMPT, config_of(llama))
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    handle.remove()
    assert len(stream.tokens) == 2
    assert stream.interrupted_forward


def test_a_users_own_handler_runs_at_once(llama: PreTrainedModel) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    handle = llama.model.layers[1].register_forward_pre_hook(at_forward(2, interrupt))
    try:
        assert len(tokens_of(llama, config_of(llama))) == 14
    finally:
        handle.remove()
        signal.signal(signal.SIGINT, before)
    assert seen == [1]


def test_a_prompt_that_is_stopped_between_its_parts_is_not_whole(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_chunks, "CPU_PROMPT_TOKENS", 4)
    stop = threading.Event()
    handle = llama.register_forward_hook(at_forward(1, stop.set))
    stream = TokenStream(llama, PROMPT, config_of(llama), stop_event=stop)
    assert list(stream) == []
    handle.remove()
    assert stream.interrupted_forward
    assert stream.num_prompt_tokens == 8


def test_a_request_that_is_stopped_while_it_waits_computes_nothing(llama: PreTrainedModel) -> None:
    waiting = TokenStream(llama, PROMPT, config_of(llama))
    thread = threading.Thread(target=lambda: list(waiting))

    def close_the_other() -> None:
        thread.start()
        waiting.close()
        thread.join(60)

    handle = llama.model.layers[0].register_forward_pre_hook(at_forward(0, close_the_other))
    assert len(list(TokenStream(llama, PROMPT, config_of(llama)))) == 14
    handle.remove()
    assert not thread.is_alive()
    assert waiting.tokens == []
    assert not waiting.interrupted_forward


def test_what_another_thread_closed_ends(llama: PreTrainedModel) -> None:
    stream = TokenStream(llama, PROMPT, config_of(llama))
    next(stream)
    closer = threading.Thread(target=stream.close)
    closer.start()
    closer.join(60)
    assert list(stream) == []
    assert len(stream.tokens) == 1
