"""Several chats of one model, step by step in turn: each answers as it does alone, wherever the experts are."""

import threading
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from support.chat import chat_store
from support.models import open_model

from offload_moe.engine.model import Model

QUESTIONS = ["How are you?", "Tell me about the sea, and the ships on it.", "Why?"]
GREEDY = {"temperature": 0, "max_new_tokens": 16}
SAMPLED = {"temperature": 1.5, "top_k": 0, "seed": 3, "max_new_tokens": 16}


@pytest.fixture(scope="module", params=[None, 4], ids=["resident", "from disk"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_model(chat_store(tmp_path_factory.mktemp("store")), request.param, context=256) as model:
        yield model


def alone(model: Model, **sampling: Any) -> list[str]:
    answers = [model.generate(question, **sampling) for question in QUESTIONS]
    assert len(set(answers)) == len(QUESTIONS)
    return answers


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_in_one_thread(model: Model, sampling: dict[str, Any]) -> None:
    expected = alone(model, **sampling)
    streams = [model.stream(question, **sampling) for question in QUESTIONS]
    parts = list(zip_longest(*streams, fillvalue=""))
    assert ["".join(each) for each in zip(*parts, strict=True)] == expected
    assert len(parts) > 4


def test_in_a_thread_each(model: Model) -> None:
    expected = alone(model, **SAMPLED)
    answers: dict[int, str] = {}

    def answer(index: int) -> None:
        answers[index] = model.generate(QUESTIONS[index], **SAMPLED)

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(len(QUESTIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answers.get(index) for index in range(len(QUESTIONS))] == expected


def test_beside_a_generate_of_the_users_own(model: Model) -> None:
    expected = alone(model, **GREEDY)[0]
    pieces = model.stream(QUESTIONS[0], **GREEDY)
    said = next(pieces)
    ids = model.tokenizer("Once upon", return_tensors="pt").input_ids
    assert model.hf.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
    assert said + "".join(pieces) == expected


def test_a_prompt_is_left_between_two_waves_of_experts(tmp_path: Path) -> None:
    """With four slots for eight experts a layer takes several waves; the conversation goes on afterwards."""
    with open_model(chat_store(tmp_path), 4, context=256) as model:
        expected = model.generate(QUESTIONS[1], **GREEDY)
        session, stop, sizes = model.chat(), threading.Event(), list[int]()

        def stop_in_the_first_wave(slots: Any) -> None:
            sizes.append(len(slots))
            stop.set()

        mover = model.engine.hierarchy.ram.mover
        used, mover.used = mover.used, stop_in_the_first_wave  # type: ignore[method-assign]
        assert list(session.send(QUESTIONS[1], stop_event=stop, **GREEDY)) == []
        mover.used = used  # type: ignore[method-assign]
        assert len(sizes) == 1  # released once: neither another wave nor another layer
        assert "".join(piece.text for piece in session.retry(**GREEDY)) == expected
