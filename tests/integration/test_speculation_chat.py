"""Guesses in conversations and behind the server: the same answers, caches that go on, and the counts of them."""

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from offload_moe_cli.status import full_statistics, status_line

from offload_moe.chat import ChatSession, ahead
from offload_moe.engine.model import Model
from offload_moe.errors import ConfigError
from offload_moe.speculate.speculation import speculation_of
from offload_moe.speculate.speculator import Speculator
from tests.support.guesses import compute_guesses
from tests.support.serving import SCHEMA_OF_NAMES, chat, events, open_tiny, served

REPEATED = "abc abc abc abc abc abc"
SETTINGS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.9, "seed": 3}]
FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.5, "seed": 5, "logit_bias": {"97": 6}},
    "stop": {"stop": ["a", "e"]},
    "penalties": {"frequency_penalty": 0.02, "presence_penalty": 0.1, "logit_bias": {"97": 2}},
    "log probabilities": {"logprobs": True, "top_logprobs": 3},
    "two choices": {"n": 2, "temperature": 1, "seed": 1, "logit_bias": {"97": 6}},
    "grammar": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "names", "schema": SCHEMA_OF_NAMES}}
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_tiny(tmp_path_factory.mktemp("model")) as loaded:
        yield loaded


@pytest.fixture
def every_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess is computed, whether it pays or not."""
    compute_guesses(monkeypatch)


def say(session: ChatSession, text: str, num_pieces: int | None = None, **settings: Any) -> str:
    """An answer, stopped after some pieces."""
    pieces = session.send(text, max_new_tokens=40, **settings)
    answer = ""
    for number, piece in enumerate(pieces, 1):
        answer += piece.text
        if number == num_pieces:
            break
    pieces.close()
    return answer


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled"])
def test_conversations_are_the_same(model: Model, settings: dict[str, Any], every_guess: None) -> None:
    """Also where an answer is stopped in the middle: what the cache holds is continued."""
    plain, guessed = model.chat(), model.chat()
    for text, num_pieces in ((REPEATED, None), ("More.", 3), (REPEATED, 5), ("And more.", None)):
        expected = say(plain, text, num_pieces, speculate="off", **settings)
        assert say(guessed, text, num_pieces, speculate="ngram", **settings) == expected
        assert len(expected) >= 3
        stats = guessed.last_stats
        assert plain.last_stats is not None
        assert plain.last_stats.guesses is None
        assert stats is not None
        assert stats.guesses is not None
        assert (stats.num_reused_tokens, stats.finish) == (
            plain.last_stats.num_reused_tokens,
            plain.last_stats.finish,
        )
    assert plain.messages == guessed.messages


def test_what_guesses_gave_is_shown(model: Model, every_guess: None) -> None:
    session, before = model.chat(), model.stats.copy()
    say(session, REPEATED, speculate="ngram", temperature=0)
    stats = session.last_stats
    assert stats is not None
    assert stats.guesses is not None
    seen, guesses = model.stats.since(before), stats.guesses
    assert (seen.num_guesses, seen.num_right_guesses) == (guesses.num_guessed, guesses.num_right)
    assert guesses.num_guessed > 0
    assert f"{guesses.num_right:,} of {guesses.num_guessed:,} guesses right" in status_line(stats, 1000)
    rows = dict(full_statistics(stats, {}))
    assert rows["guessed tokens"].startswith(f"{guesses.num_right:,} of {guesses.num_guessed:,} right")
    assert "times as fast" in rows["with guesses"]


def test_automatic_guesses_change_no_answer(model: Model) -> None:
    answers = {say(model.chat(), REPEATED, temperature=0, speculate=choice) for choice in ("auto", "off", "ngram")}
    assert len(answers) == 1


def test_a_choice_that_does_not_exist_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="Did you mean ngram"):
        model.generate("Hi", speculate="ngrams")


@pytest.mark.parametrize("name", FIELDS)
def test_requests_get_the_same_answers(
    model: Model, name: str, every_guess: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": REPEATED}]
    before = model.stats.num_guesses
    with served(model) as client:
        got = chat(client, messages, max_tokens=60, **FIELDS[name])
    assert model.stats.num_guesses > before
    monkeypatch.setattr(speculation_of(model.hf), "choice", "off")
    before = model.stats.num_guesses
    with served(model) as client:
        expected = chat(client, messages, max_tokens=60, **FIELDS[name])
    assert model.stats.num_guesses == before
    assert got["choices"] == expected["choices"]
    assert got["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"] > 1
    if name == "grammar":
        assert len(json.loads(got["choices"][0]["message"]["content"])["names"]) == 6


@pytest.mark.parametrize("name", ["greedy", "sampled", "stop", "log probabilities"])
def test_a_stream_has_the_same_events(
    model: Model, name: str, every_guess: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece for each token, in order, though several come of one pass; the last counts all of them."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": REPEATED}], "temperature": 0, "max_tokens": 60}
    body |= {"stream": True, "stream_options": {"include_usage": True}} | FIELDS[name]
    found = []
    for is_guessed in (True, False):
        if not is_guessed:
            monkeypatch.setattr(speculation_of(model.hf), "choice", "off")
        before = model.stats.num_guesses
        with served(model) as client:
            *parts, done = events(client.post("/v1/chat/completions", json=body).text)
        assert done == "[DONE]"
        assert (model.stats.num_guesses > before) == is_guessed
        assert len(parts) > 4
        found.append([(part["choices"], part["usage"] and part["usage"]["completion_tokens"]) for part in parts])
    assert found[0] == found[1]


def test_metrics_count_guesses(model: Model, every_guess: None) -> None:
    with served(model) as client:
        chat(client, [{"role": "user", "content": REPEATED}], max_tokens=30)
        text, live = client.get("/metrics").text, client.get("/live").json()
    right, wrong = live["guesses"]["right"], live["guesses"]["wrong"]
    assert right + wrong == model.stats.num_guesses > 0
    assert f'offload_moe_guesses_total{{kind="right"}} {right}' in text
    assert f'offload_moe_guesses_total{{kind="wrong"}} {wrong}' in text
    assert "offload_moe_guesses_saved_seconds" in text
    assert "offload_moe_guess_gain" in text


def test_a_conversation_goes_on_with_what_was_learned(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that returns to a server; others begin anew, as does one whose cache was dropped."""
    begun: list[Speculator] = []
    begin = Speculator.begin
    monkeypatch.setattr(
        Speculator, "begin", lambda self, ids, cache=None: (begun.append(self), begin(self, ids, cache))[1]
    )
    first = [{"role": "user", "content": REPEATED}]
    other = [{"role": "user", "content": "Something else, which is about as long."}]
    with served(model, cache_slots=2) as client:
        answer = chat(client, first, max_tokens=20)["choices"][0]["message"]["content"]
        chat(client, other, max_tokens=5)
        returned = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "More."}]
        assert chat(client, returned, max_tokens=5)["usage"]["prompt_tokens_details"]["cached_tokens"] > 20
    assert begun[2] is begun[0] is not begun[1]
    with served(model, cache_slots=0) as client:
        chat(client, returned, max_tokens=5)
        chat(client, returned, max_tokens=5)
    assert len({*begun}) == 4


@pytest.mark.parametrize(("point", "num_signals"), [("takes_rows", 1), ("roll_back", 2), ("note_pass", 1)])
def test_an_interrupt_within_a_pass_of_guesses(
    model: Model, point: str, num_signals: int, every_guess: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its rows are computed, while wrong ones are taken back, and behind it. A second one ends the step at once.

    The text so far is kept, and the next answers are those of a conversation that was stopped there without guesses.
    """
    guessed, plain = model.chat(), model.chat()
    say(guessed, REPEATED, speculate="ngram", temperature=0)
    said = say(plain, REPEATED, speculate="off", temperature=0)
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        for _ in range(num_signals if calls == 3 else 0):
            signal.raise_signal(signal.SIGINT)

    def with_interrupt(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            interrupt()
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        owner = Speculator if point == "note_pass" else ahead
        patch.setattr(owner, point, with_interrupt(getattr(owner, point)))
        with pytest.raises(KeyboardInterrupt):
            say(guessed, REPEATED, speculate="ngram", temperature=0)
    assert calls >= 3
    kept = guessed.messages[-1]["content"]
    assert guessed.messages[-1]["role"] == "assistant"
    assert len(kept) >= 2
    pieces, text = plain.send(REPEATED, max_new_tokens=40, speculate="off", temperature=0), ""
    while text != kept:
        text += next(pieces).text
    pieces.close()
    assert plain.messages == guessed.messages
    for message in ("More.", REPEATED):
        expected = say(plain, message, speculate="off", temperature=0)
        assert say(guessed, message, speculate="ngram", temperature=0) == expected
    assert said != kept
    assert guessed.last_stats is not None
    assert plain.last_stats is not None
    assert guessed.last_stats.num_reused_tokens == plain.last_stats.num_reused_tokens > 40
