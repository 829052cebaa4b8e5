"""Answers that share passes: tokens, logits and caches of each are those it has alone, in whatever order they come."""

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import write_checkpoint
from support.models import open_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from offload_moe.chat import sharing
from offload_moe.chat.steering import Steering
from offload_moe.chat.stream import TokenStream
from offload_moe.convert.quantize import quantize
from offload_moe.decode.plan import PassPlan
from offload_moe.engine.model import Model
from offload_moe.errors import TransferError
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.governor import Governor
from offload_moe.speculate.row_governor import RowGovernor
from offload_moe.speculate.speculation import speculation_of
from tests.support.chat import byte_tokenizer
from tests.support.passes import contents

STORES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"sliding_window": 16},  # windows and whole layers
    "qwen3_moe": {},
    "deepseek_v3": {"qk_rope_head_dim": 16},  # latents
    "qwen3_next": {  # states
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "head_dim": 32,
    },
    "granitemoe": {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
}
OTHERS = (
    "mixtral",
    "qwen2_moe",
    "olmoe",
    "aria_text",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "granitemoeshared",
    "hy_v3",
    "minimax_m2",
    "solar_open",
)
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 0}
LENGTHS = (9, 3, 17, 6, 11)  # of prompts
NUM_NEW = (24, 30, 9, 17, 1)
Contents = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("stores"), {}
    for name, changes in STORES.items():
        write_checkpoint(
            root / name, name, **{"head_dim": 16, "hidden_size": 64, "max_position_embeddings": 512} | changes
        )
        made[name] = quantize(root / name, root / f"{name}-store", codec="nf4")
    return made


@pytest.fixture(scope="module")
def model(stores: dict[str, Path]) -> Iterator[Model]:
    with open_model(stores["gpt_oss"]) as loaded:
        yield loaded


@pytest.fixture(scope="module", autouse=True)
def always_shared() -> Iterator[None]:
    """Whether it pays or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowGovernor, "choose", lambda self, most: min(most, MAX_ROWS))
        patch.setattr(RowGovernor, "rate", lambda self, num_rows: float(num_rows))
        yield


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each pass but those of prompts."""
    return counted_passes(monkeypatch)


def counted_passes(
    monkeypatch: pytest.MonkeyPatch, then: Callable[[Sequence[Any]], None] = lambda caches: None
) -> list[int]:
    """then: called behind each pass, with the caches of its rows."""
    counts: list[int] = []
    call = PassPlan.__call__

    def counted(self: PassPlan, x: Tensor, step: Any) -> Tensor:
        is_prompt = any(not cache.get_seq_length() for cache in step.caches)
        result = call(self, x, step)
        if not is_prompt:
            counts.append(x.shape[1])
            then(step.caches)
        return result

    monkeypatch.setattr(PassPlan, "__call__", counted)
    return counts


class Answer:
    """One of several: its stream, its cache, and the model's own logits before each token."""

    def __init__(self, model: Model, number: int, **choices: Any) -> None:
        steering = choices.pop("steering", {})
        speculator, stop_event = choices.pop("speculator", None), choices.pop("stop_event", None)
        self.cache, self.logits = DynamicCache(config=model.hf.config), list[Tensor]()
        defaults = {"do_sample": False, "max_new_tokens": NUM_NEW[number], "eos_token_id": 1000}
        config = GenerationConfig(**defaults | {"disable_compile": True, "pad_token_id": 0} | choices)
        generator = torch.Generator().manual_seed(number)
        self.stream = TokenStream(
            model.hf,
            torch.randint(3, 64, (1, LENGTHS[number]), generator=generator),
            config,
            cache=self.cache,
            tokenizer=byte_tokenizer(),
            seed=number,
            stop_event=stop_event,
            steering=Steering(observe=self.logits.append, **steering),
            speculator=speculator,
        )

    def check(self, alone: "Alone", *, is_whole: bool = True) -> None:
        """What came so far, and what the cache holds once it is closed."""
        tokens = self.stream.tokens
        assert tokens == (alone.tokens if is_whole else alone.tokens[: len(tokens)])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(self.logits, alone.logits, strict=False))
        self.stream.close()
        check_cache(self.cache, alone.caches)


class Alone:
    """An answer that nothing is computed with: its tokens and logits, and the cache at each length."""

    def __init__(self, model: Model, number: int, **choices: Any) -> None:
        answer = Answer(model, number, **choices)
        self.caches: dict[int, Contents] = {}
        for _ in answer.stream:
            self.caches[answer.cache.get_seq_length()] = contents(answer.cache)
        self.tokens, self.logits = answer.stream.tokens, answer.logits


def check_cache(cache: DynamicCache, expected: dict[int, Contents]) -> None:
    for mine, theirs in zip(contents(cache), expected[cache.get_seq_length()], strict=True):
        assert theirs[0].abs().max() > 1e-3
        assert all(map(torch.equal, mine, theirs))


def alone_of(model: Model, **choices: Any) -> list[Alone]:
    found = [Alone(model, number, **choices) for number in range(len(LENGTHS))]
    assert len({tuple(each.tokens) for each in found}) == len(LENGTHS)
    return found


def in_turn(streams: Sequence[TokenStream]) -> None:
    """A token of each at a time, until all have ended."""
    left = list(streams)
    while left:
        left = [stream for stream in left if next(stream, None) is not None]


@pytest.mark.parametrize("choices", [{"repetition_penalty": 1.5}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", STORES)
def test_each_answer_is_the_one_it_is_alone(
    name: str, choices: dict[str, Any], stores: dict[str, Path], passes: list[int]
) -> None:
    with open_model(stores[name]) as model:
        alone = alone_of(model, **choices)
        assert {*passes} == {1}
        passes.clear()
        answers, before = [Answer(model, number, **choices) for number in range(len(LENGTHS))], model.stats.copy()
        in_turn([answer.stream for answer in answers])
        seen = model.stats.since(before)
        for answer, each in zip(answers, alone, strict=True):
            answer.check(each)
    assert passes == [4] * 8 + [3] * 8 + [2] * 7 + [1] * 6  # the longest has 29 tokens behind its first
    assert (seen.num_passes, seen.num_rows) == (len(passes), sum(passes))
    assert seen.rows_per_pass == pytest.approx(sum(passes) / len(passes))


@pytest.mark.parametrize("num_slots", [2, 6, 16])
def test_experts_that_are_not_resident(num_slots: int, stores: dict[str, Path], passes: list[int]) -> None:
    """And contexts that outgrow the plan."""
    with open_model(stores["qwen3_moe"]) as model:
        alone = alone_of(model, **SAMPLED)
    with open_model(stores["qwen3_moe"], num_slots, context=16) as model:
        passes.clear()
        answers = [Answer(model, number, **SAMPLED) for number in range(len(LENGTHS))]
        in_turn([answer.stream for answer in answers])
        for answer, each in zip(answers, alone, strict=True):
            answer.check(each)
    assert max(passes) == 4


@pytest.fixture(scope="module")
def sampled_alone(model: Model) -> list[Alone]:
    return alone_of(model, **SAMPLED)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedule=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=20, max_size=80))
def test_any_order_of_arrivals_and_ends(
    schedule: list[tuple[int, int]], model: Model, sampled_alone: list[Alone]
) -> None:
    """Whose step comes next; nine in place of a step closes the answer."""
    answers: dict[int, Answer] = {}
    for number, action in schedule:
        answer = answers.get(number) or answers.setdefault(number, Answer(model, number, **SAMPLED))
        if action == 9 and answer.stream.tokens:
            answer.check(sampled_alone[number], is_whole=False)
        next(answer.stream, None)
    for number, answer in answers.items():
        answer.check(sampled_alone[number], is_whole=False)


def test_a_thread_for_each(model: Model, sampled_alone: list[Alone]) -> None:
    answers = [Answer(model, number, **SAMPLED) for number in range(len(LENGTHS))]
    threads = [threading.Thread(target=list, args=(answer.stream,)) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for answer, alone in zip(answers, sampled_alone, strict=True):
        answer.check(alone)


def forced_after(number: int, run: Sequence[int]) -> dict[str, Any]:
    """Steering that puts a run behind a token."""
    count = iter(range(1, 1000))
    return {"forced": lambda: run if next(count) == number else ()}


@pytest.mark.parametrize("run", [[5], [5, 6], [9] * 9])
def test_a_forced_run_follows_a_token_that_was_computed_already(
    model: Model, run: list[int], sampled_alone: list[Alone], passes: list[int]
) -> None:
    alone = Alone(model, 0, steering=forced_after(4, run), **SAMPLED)
    assert alone.tokens[4 : 4 + len(run)] == run
    passes.clear()
    answers = [Answer(model, 1, **SAMPLED), Answer(model, 0, steering=forced_after(4, run), **SAMPLED)]
    in_turn([answer.stream for answer in answers])
    assert passes[:3] == [2, 2, 2]
    answers[0].check(sampled_alone[1])
    answers[1].check(alone)


def test_an_answer_ends_at_a_string_or_a_token_of_its_own(model: Model, sampled_alone: list[Alone]) -> None:
    whole, other = sampled_alone[0].tokens, sampled_alone[1].tokens
    stop, end = byte_tokenizer().decode(whole[4:6]), next(token for token in other[3:] if token not in other[:3])
    stopped = Answer(model, 0, **SAMPLED | {"stop_strings": [stop, "nor this"]})
    ended = Answer(model, 1, **SAMPLED | {"eos_token_id": end})
    in_turn([stopped.stream, ended.stream])
    assert 2 < len(stopped.stream.tokens) < len(whole)
    assert ended.stream.tokens == other[: other.index(end) + 1]
    stopped.check(sampled_alone[0], is_whole=False)
    ended.check(sampled_alone[1], is_whole=False)


def test_a_stop_ends_one_and_the_others_go_on(model: Model, sampled_alone: list[Alone]) -> None:
    stop = threading.Event()
    answers = [Answer(model, 0, **SAMPLED), Answer(model, 1, stop_event=stop, **SAMPLED), Answer(model, 2, **SAMPLED)]
    for _ in range(4):
        for answer in answers:
            next(answer.stream)
    stop.set()
    in_turn([answer.stream for answer in answers])
    assert len(answers[1].stream.tokens) == 4
    for answer, alone in zip(answers, sampled_alone, strict=False):
        answer.check(alone, is_whole=answer is not answers[1])


def test_a_pass_that_fails_is_undone_and_each_goes_alone(
    model: Model, sampled_alone: list[Alone], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(caches: Sequence[Any]) -> None:
        if len(caches) == 3:
            raise TransferError("an expert of one of them cannot be read")

    passes = counted_passes(monkeypatch, fail)
    answers = [Answer(model, number, **SAMPLED) for number in range(3)]
    in_turn([answer.stream for answer in answers])
    assert passes[passes.index(3) :][:4] == [3, 1, 1, 1]
    for answer, alone in zip(answers, sampled_alone, strict=False):
        answer.check(alone)


def test_an_error_reaches_the_answer_that_it_belongs_to(
    model: Model, sampled_alone: list[Alone], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [Answer(model, number, **SAMPLED) for number in range(3)]

    def fail(caches: Sequence[Any]) -> None:
        if answers[1].cache in caches and len(answers[1].stream.tokens) > 5:
            raise TransferError("its expert cannot be read")

    counted_passes(monkeypatch, fail)
    left = list(answers)
    with pytest.raises(TransferError, match="its expert"):
        while True:
            for answer in answers:
                next(answer.stream)
    assert len(answers[1].stream.tokens) == 6
    left = [answers[0].stream, answers[2].stream]
    in_turn(left)
    answers[0].check(sampled_alone[0])
    answers[2].check(sampled_alone[2])


def test_an_answer_that_ends_waits_for_the_pass_that_computes_its_row(
    model: Model, sampled_alone: list[Alone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed by another thread: afterwards its cache may be continued."""
    answers, closing = [Answer(model, 0, **SAMPLED), Answer(model, 1, **SAMPLED)], threading.Event()

    def close() -> None:
        closing.set()
        answers[1].stream.close()

    thread = threading.Thread(target=close)

    def close_elsewhere(caches: Sequence[Any]) -> None:
        if len(caches) == 2 and not thread.ident:
            thread.start()
            assert closing.wait(60)
            thread.join(0.05)
            assert thread.is_alive()

    for answer in answers:
        next(answer.stream)
    counted_passes(monkeypatch, close_elsewhere)
    next(answers[0].stream)
    thread.join(60)
    assert not thread.is_alive()
    assert not answers[1].stream.has_lost_cache
    in_turn([answers[0].stream])
    answers[0].check(sampled_alone[0])
    answers[1].check(sampled_alone[1], is_whole=False)


def test_an_answer_that_ends_within_a_pass_of_its_thread_gives_its_cache_up(
    model: Model, sampled_alone: list[Alone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when garbage is collected there."""
    answers = [Answer(model, number, **SAMPLED) for number in range(3)]
    for answer in answers:
        next(answer.stream)
    passes = counted_passes(monkeypatch, lambda caches: answers[1].stream.close())
    next(answers[0].stream)
    assert answers[1].stream.has_lost_cache
    in_turn([answers[0].stream, answers[2].stream])
    assert passes[:3] == [3, 1, 2]  # the last one had its logits already
    answers[0].check(sampled_alone[0])
    answers[2].check(sampled_alone[2])


@pytest.mark.parametrize("is_forked", [False, True])
def test_a_pass_that_does_not_end_is_not_waited_for(
    model: Model, is_forked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes too long, or its thread does not exist in this process."""
    monkeypatch.setattr(sharing, "LIMIT_S", 60 if is_forked else 0.01)
    answers = [Answer(model, 0, **SAMPLED), Answer(model, 1, **SAMPLED)]
    for answer in answers:
        next(answer.stream)

    def close_elsewhere(caches: Sequence[Any]) -> None:
        thread, pid = threading.Thread(target=answers[1].stream.close), os.getpid()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: pid + is_forked)
            thread.start()
            thread.join(20)
        assert not thread.is_alive()

    counted_passes(monkeypatch, close_elsewhere)
    next(answers[0].stream)
    assert answers[1].stream.has_lost_cache


def test_what_the_experts_did_is_divided(model: Model) -> None:
    gc.collect()  # an answer of a test before, which still waits for its next token, would take part
    before = model.stats.copy()
    answers = [Answer(model, number, **SAMPLED) for number in range(3)]
    in_turn([answer.stream for answer in answers])
    shares = [answer.stream.share for answer in answers]
    assert shares[0].num_hits < 0 < shares[1].num_hits
    assert sum(share.num_hits for share in shares) == sum(share.num_absent for share in shares) == 0
    assert -shares[0].num_hits < model.stats.since(before).num_hits
    assert all(answer.stream.decode_s > 0.3 * answers[0].stream.decode_s / NUM_NEW[0] for answer in answers)


def test_answers_with_good_guesses_go_alone(model: Model, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others share; which of them does what changes no token."""
    alone = [Alone(model, number) for number in range(3)]
    monkeypatch.setattr(Governor, "rate", lambda self, kind, most: 99.0 if most else 1.0)
    monkeypatch.setattr(Governor, "choose", lambda self, kind, most, num_behind=0: most)
    speculators = [speculation_of(model.hf).conversation("ngram"), None, None]
    passes.clear()
    answers = [Answer(model, number, speculator=each) for number, each in enumerate(speculators)]
    in_turn([answer.stream for answer in answers])
    for answer, each in zip(answers, alone, strict=True):
        answer.check(each)
    assert speculators[0] is not None
    assert speculators[0].tally.num_guessed
    assert MAX_ROWS in passes
    assert passes.count(2) + passes.count(3) >= NUM_NEW[2] - 1


def test_nothing_is_shared_where_a_token_is_to_be_seen_alone(
    model: Model, sampled_alone: list[Alone], passes: list[int]
) -> None:
    handles = [module.register_forward_hook(lambda *_: None) for module in (model.hf, model.hf.get_decoder())]
    for handle in handles:
        answers = [Answer(model, number, **SAMPLED) for number in range(2)]
        in_turn([answer.stream for answer in answers])
        handle.remove()
    with model.trace():
        traced = [Answer(model, number, **SAMPLED) for number in range(2)]
        in_turn([answer.stream for answer in traced])
    for answer, alone in zip(traced, sampled_alone, strict=False):
        answer.check(alone)
    assert {*passes} == {1}


def test_exact_numbers_are_computed_alone(stores: dict[str, Path]) -> None:
    with open_model(stores["qwen3_moe"], exact=True, fast_path=False) as model:
        alone = [Alone(model, number, **SAMPLED) for number in range(2)]
        before = model.stats.copy()
        answers = [Answer(model, number, **SAMPLED) for number in range(2)]
        in_turn([answer.stream for answer in answers])
        assert [answer.stream.tokens for answer in answers] == [each.tokens for each in alone]
        assert model.stats.since(before).rows_per_pass == 1


def test_ended_answers_free_their_caches(model: Model) -> None:
    answers = [Answer(model, number, **SAMPLED) for number in range(2)]
    in_turn([answer.stream for answer in answers])
    caches, streams = [ref(answer.cache) for answer in answers], [answer.stream for answer in answers]
    del answers
    assert [cache() for cache in caches] == [None, None]
    assert all(stream.tokens for stream in streams)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str, tmp_path: Path, passes: list[int]) -> None:
    write_checkpoint(tmp_path / "checkpoint", family, head_dim=16, hidden_size=64)
    with open_model(quantize(tmp_path / "checkpoint", tmp_path / "store", codec="nf4")) as model:
        alone = [Alone(model, number, max_new_tokens=6) for number in range(3)]
        passes.clear()
        answers = [Answer(model, number, max_new_tokens=6) for number in range(3)]
        in_turn([answer.stream for answer in answers])
        for answer, each in zip(answers, alone, strict=True):
            answer.check(each)
        assert passes == [3] * 5
