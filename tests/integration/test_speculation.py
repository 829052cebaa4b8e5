"""Guessed tokens change no token, no logit and no cache, whatever is guessed and however it is chosen."""

import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import write_checkpoint
from support.models import open_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from offload_moe.chat import ahead
from offload_moe.chat.steering import Steering
from offload_moe.chat.stream import TokenStream
from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model
from offload_moe.errors import ConfigError
from offload_moe.families.cache_name import with_cache
from offload_moe.residency.counters import Counters
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.governor import EveryGuess
from offload_moe.speculate.guess import MOST_GUESSES, Guess
from offload_moe.speculate.speculation import speculation_of
from offload_moe.speculate.speculator import Speculator
from tests.support.chat import byte_tokenizer
from tests.support.guesses import compute_guesses
from tests.support.passes import contents

LINEAR: dict[str, Any] = {
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
STORES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 48}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 16}),  # windows and whole layers
    "deepseek_v3": ("deepseek_v3", {"qk_rope_head_dim": 16}),  # latents
    "glm4_moe": ("glm4_moe", {}),
    "qwen3_next": ("qwen3_next", LINEAR),  # states
    "qwen3_5_moe": ("qwen3_5_moe_text", LINEAR),
    "qwen3_next, modules": ("qwen3_next", LINEAR | {"linear_key_head_dim": 8}),  # that no kernel takes
}
PROMPT = torch.tensor([[7, 9, 11, 5, 5, 60, 3, 42, 17]])
PATTERNS = [(number, num_right) for number in range(1, MOST_GUESSES + 1) for num_right in range(number + 1)]
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "top-p and min-p": SAMPLED | {"top_p": 0.9, "min_p": 0.01},
    "penalty": {"repetition_penalty": 1.4},
    "penalty and sampled": SAMPLED | {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    "ends": SAMPLED | {"eos_token_id": [5, 6], "min_new_tokens": 9},
}
Contents = list[tuple[Tensor, Tensor]]


class Recalled:
    """Guesses the tokens of an answer that is known, but for wrong ones as patterns say: how many, how many right."""

    certainties = (0.5,)
    is_free = False

    def __init__(self, answer: Sequence[int], patterns: Sequence[tuple[int, int]] = PATTERNS) -> None:
        self._answer, self._patterns, self._at = answer, list(patterns), 0
        self.made: Counter[tuple[int, int]] = Counter()

    def begin(self, ids: Sequence[int]) -> None:
        self._at = 0

    def take(self, token: int) -> None:
        self._at += 1

    def guess(self, most: int) -> Guess:
        number, num_right = self._patterns[self.made.total() % len(self._patterns)]
        known = self._answer[self._at :][: min(most, number)]
        self.made[number, num_right] += 1
        return Guess(tuple(token if at < num_right else (token + 1) % 64 for at, token in enumerate(known)))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("stores"), {}
    for name, (family, changes) in STORES.items():
        sizes = {"head_dim": 16, "hidden_size": 64, "max_position_embeddings": 512}
        write_checkpoint(root / name, family, **sizes | changes)
        made[name] = quantize(root / name, root / f"{name}-store", codec="nf4")
    return made


@pytest.fixture(scope="module")
def model(stores: dict[str, Path]) -> Any:
    with open_model(stores["gpt_oss"]) as loaded:
        yield loaded


def speculator_of(source: Any) -> Speculator:
    return Speculator(source, PassCosts(), Counters(), EveryGuess())


def config_of(**settings: Any) -> GenerationConfig:
    no_end = 1000  # None would be the model's own
    defaults = {"max_new_tokens": 40, "disable_compile": True, "do_sample": False, "pad_token_id": 0}
    defaults["eos_token_id"] = no_end
    return GenerationConfig(**(defaults | settings))


def stream_of(model: Model, source: Any = None, *, cache: Any = None, **settings: Any) -> TokenStream:
    steering = settings.pop("steering", Steering())
    cache = DynamicCache(config=model.hf.config) if cache is None else cache
    return TokenStream(
        model.hf,
        PROMPT,
        config_of(**settings),
        cache=cache,
        tokenizer=byte_tokenizer(),
        seed=5,
        steering=steering,
        speculator=None if source is None else speculator_of(source),
    )


def check_cache(cache: DynamicCache, expected: Contents) -> None:
    for mine, theirs in zip(contents(cache), expected, strict=True):
        assert theirs[0].abs().max() > 1e-3
        assert all(map(torch.equal, mine, theirs))


def step_by_step(model: Model, **settings: Any) -> tuple[list[int], dict[int, Contents]]:
    """An answer without guesses, and the cache at each length."""
    cache, seen = DynamicCache(config=model.hf.config), {}
    stream = stream_of(model, cache=cache, **settings)
    for _ in stream:
        seen[cache.get_seq_length()] = contents(cache)
    return stream.tokens, seen


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("modules" in name)) for name in STORES]
)
def test_every_pattern_of_rejections(
    name: str, settings: dict[str, Any], stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rolled: Counter[int] = Counter()
    with open_model(stores[name]) as model:
        tokens, seen = step_by_step(model, max_new_tokens=180, **settings)
        roll_back = ahead.roll_back

        def checked(cache: DynamicCache, num_tokens: int) -> None:
            roll_back(cache, num_tokens)
            num_rolled[num_tokens] += 1
            check_cache(cache, seen[cache.get_seq_length()])

        monkeypatch.setattr(ahead, "roll_back", checked)
        source, cache = Recalled(tokens), DynamicCache(config=model.hf.config)
        stream = stream_of(model, source, cache=cache, max_new_tokens=180, **settings)
        assert list(stream) == tokens
        check_cache(cache, seen[len(PROMPT[0]) + 179])
    assert set(source.made) == set(PATTERNS)
    assert set(num_rolled) == set(range(1, MOST_GUESSES + 1))
    assert len(set(tokens)) > 4


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_gives_the_same_tokens_and_logits(model: Model, name: str) -> None:
    plain: list[Tensor] = []
    seen: list[Tensor] = []
    tokens = list(stream_of(model, steering=Steering(observe=plain.append), **SETTINGS[name]))
    source = Recalled(tokens, [(7, 7), (5, 2), (3, 0)])
    got = list(stream_of(model, source, steering=Steering(observe=seen.append), **SETTINGS[name]))
    assert got == tokens
    assert len(plain) == len(tokens) > 5
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen, plain, strict=True))
    assert source.made.total() < len(tokens) - 3


def test_a_stop_string_ends_within_guesses(model: Model) -> None:
    whole = list(stream_of(model, **SAMPLED))
    stop = byte_tokenizer().decode(whole[4:6])
    settings = SAMPLED | {"stop_strings": [stop, "nor this"]}
    tokens = list(stream_of(model, **settings))
    assert 2 < len(tokens) < len(whole)
    cache = DynamicCache(config=model.hf.config)
    assert list(stream_of(model, Recalled(whole, [(7, 7)]), cache=cache, **settings)) == tokens
    assert cache.get_seq_length() == len(PROMPT[0]) + len(tokens) - 1


@pytest.mark.parametrize("num_right", [0, 3, 7])
def test_no_more_is_computed_than_may_come(model: Model, num_right: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    handle = model.hf.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    whole = list(stream_of(model, max_new_tokens=12))
    rows.clear()
    assert list(stream_of(model, Recalled(whole, [(7, num_right)]), max_new_tokens=12)) == whole
    handle.remove()
    assert len(PROMPT[0]) + sum(rows[1:]) >= len(PROMPT[0]) + 11
    left = 11
    for number in rows[1:]:
        assert number <= left
        left -= min(number, num_right + 1)
    assert left == 0


@pytest.mark.parametrize("run", [[5, 6], [9] * 6, [9] * 9])
@pytest.mark.parametrize("is_guessed", [True, False])
def test_a_forced_run_may_be_guessed_or_not(model: Model, run: list[int], is_guessed: bool) -> None:
    def forced_after(*numbers: int) -> Callable[[], Sequence[int]]:
        count = iter(range(1, 1000))
        return lambda: run if next(count) in numbers else ()

    tokens = list(stream_of(model, steering=Steering(forced=forced_after(4, 9))))
    assert tokens[4 : 4 + len(run)] == run
    known = tokens if is_guessed else [(token + 7) % 64 for token in tokens]
    for pattern in ((7, 7), (4, 2)):
        cache = DynamicCache(config=model.hf.config)
        source = Recalled(known, [pattern])
        assert list(stream_of(model, source, cache=cache, steering=Steering(forced=forced_after(4, 9)))) == tokens
        assert cache.get_seq_length() == len(PROMPT[0]) + len(tokens) - 1


@pytest.mark.parametrize("num_tokens", range(1, 12))
def test_an_answer_that_is_closed_leaves_the_cache_without_its_last_token(model: Model, num_tokens: int) -> None:
    whole, seen = step_by_step(model)
    cache = DynamicCache(config=model.hf.config)
    with stream_of(model, Recalled(whole, [(7, 5)]), cache=cache) as stream:
        for _ in range(num_tokens):
            next(stream)
    assert stream.tokens == whole[:num_tokens]
    check_cache(cache, seen[len(PROMPT[0]) + num_tokens - 1])


@pytest.mark.parametrize("point", ["takes_rows", "roll_back"])
def test_an_interrupt_within_guesses_leaves_the_cache_of_the_tokens(
    model: Model, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before their pass, and while wrong ones are taken back."""
    expected, seen = step_by_step(model)
    function, cache = getattr(ahead, point), DynamicCache(config=model.hf.config)
    stream = stream_of(model, Recalled(expected, [(7, 5)]), cache=cache)

    def interrupted(*arguments: Any) -> Any:
        if len(stream.tokens) > 9:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ahead, point, interrupted)
        list(stream)
    stream.close()
    assert 9 < len(stream.tokens) < len(expected)
    assert stream.tokens == expected[: len(stream.tokens)]
    assert not stream.interrupted_forward
    check_cache(cache, seen[len(PROMPT[0]) + len(stream.tokens) - 1])


def test_no_guesses_are_made_for_a_pass_that_cannot_take_them(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their time would be lost."""
    source, expected = Recalled([], [(7, 0)]), list(stream_of(model))
    monkeypatch.setattr(ahead, "takes_rows", lambda hf, cache, num_tokens: False)
    assert list(stream_of(model, source)) == expected
    assert source.made.total() == 0


@pytest.mark.parametrize("num_slots", [2, 6, 16])
def test_experts_that_are_not_resident(num_slots: int, stores: dict[str, Path]) -> None:
    with open_model(stores["qwen3_moe"]) as model:
        tokens, seen = step_by_step(model)
    with open_model(stores["qwen3_moe"], num_slots) as model:
        cache = DynamicCache(config=model.hf.config)
        assert list(stream_of(model, Recalled(tokens, [(7, 4), (2, 2)]), cache=cache)) == tokens
        check_cache(cache, seen[cache.get_seq_length()])


@torch.inference_mode()
def second_token_shares(model: Model, top_k: int) -> dict[int, float]:
    """The exact distribution of the second token, of those drawn from the `top_k` likeliest at temperature 1."""

    def draw(ids: list[int]) -> list[tuple[int, float]]:
        cache = DynamicCache(config=model.hf.config)
        model.hf(PROMPT, **with_cache(cache))
        logits = model.hf(PROMPT).logits[0, -1]
        for token in ids:
            logits = model.hf(torch.tensor([[token]]), **with_cache(cache)).logits[0, -1]
        values, tokens = logits.topk(top_k)
        return list(zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True))

    shares: Counter[int] = Counter()
    for first, share in draw([]):
        for second, conditional in draw([first]):
            shares[second] += share * conditional  # type: ignore[assignment]
    return dict(shares)


@pytest.mark.slow
def test_sampled_tokens_have_the_models_distribution(model: Model) -> None:
    """Whether a guess is right or wrong, drawn from torch's own random numbers. See also `test_guessed_draws.py`."""
    shares = second_token_shares(model, 3)
    likeliest = max(shares, key=shares.__getitem__)
    torch.manual_seed(3)
    counts: Counter[int] = Counter()
    num_answers, base = 2_000, DynamicCache(config=model.hf.config)
    with torch.inference_mode():
        model.hf(PROMPT[:, :-1], **with_cache(base))
    config = config_of(do_sample=True, temperature=1.0, top_k=3, max_new_tokens=3)
    for _ in range(num_answers):
        source = Recalled([0, likeliest, likeliest], [(2, 2)])
        stream = TokenStream(model.hf, PROMPT, config, cache=base, speculator=speculator_of(source))
        counts[list(stream)[1]] += 1
        for layer in base.layers:
            layer.keys, layer.values = layer.keys[:, :, : len(PROMPT[0]) - 1], layer.values[:, :, : len(PROMPT[0]) - 1]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = len(PROMPT[0]) - 1
    assert set(counts) <= set(shares)
    distance = sum((counts[t] - share * num_answers) ** 2 / (share * num_answers) for t, share in shares.items())
    assert distance < len(shares) - 1 + 4 * (2 * (len(shares) - 1)) ** 0.5


def test_exact_numbers_are_not_guessed(stores: dict[str, Path]) -> None:
    with open_model(stores["mixtral"], exact=True, fast_path=False, speculate="ngram") as model:
        assert "fast path" in speculation_of(model.hf).why_off
        assert any("No tokens are guessed" in notice for notice in model.notices)
        assert speculation_of(model.hf).conversation() is None


def test_guesses_whose_states_were_not_planned_are_refused(stores: dict[str, Path]) -> None:
    """Loaded without guesses, a model with states has memory for those of shared passes alone; others need none."""
    with open_model(stores["qwen3_next"], speculate="off") as model:
        with pytest.raises(ConfigError, match=r"no memory was planned for the earlier states .* speculate='ngram'"):
            speculation_of(model.hf).conversation("ngram")
        assert speculation_of(model.hf).conversation() is None
        assert speculation_of(model.hf).may_share
    with open_model(stores["mixtral"], speculate="off") as model:
        assert speculation_of(model.hf).conversation("ngram") is not None


def test_recording_pauses_guesses(model: Model) -> None:
    assert speculation_of(model.hf).conversation() is not None
    with model.trace():
        assert speculation_of(model.hf).conversation() is None
    assert speculation_of(model.hf).conversation("ngram") is not None
    assert speculation_of(model.hf).conversation("off") is None


def test_a_hook_of_the_users_sees_a_token_at_a_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_guesses(monkeypatch)
    speculator = speculation_of(model.hf).conversation("ngram")
    assert speculator is not None
    speculator.begin([5, 6, 7] * 3)
    speculator.take(5)
    assert list(speculator.guess(3)) == [6, 7, 5]
    for module in (model.hf, model.hf.get_decoder(), model.hf.get_output_embeddings()):
        for add in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = add(lambda *_: None)
            assert not speculator.guess(3)
            handle.remove()
    assert speculator.guess(3)
