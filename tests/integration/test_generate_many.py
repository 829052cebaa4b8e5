"""Many prompts at once: the answers of one after another, in their order, and errors in their place."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_moe.chat.many import Many
from offload_moe.chat.reasoning import Piece
from offload_moe.engine.model import Model
from offload_moe.errors import BudgetError, ConfigError, ModelClosed
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.row_governor import RowGovernor
from tests.support.serving import open_tiny

QUESTIONS = [
    f"Tell me about {word}{'!' * number * 5}" for number, word in enumerate(["ice", "salt", "moss", "glass", "tea"])
]
SAMPLED = {"temperature": 1.2, "top_k": 0, "seed": 3, "max_new_tokens": 14}


@pytest.fixture
def always_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowGovernor, "choose", lambda self, most: min(most, MAX_ROWS))
    monkeypatch.setattr(RowGovernor, "rate", lambda self, num_rows: float(num_rows))


@pytest.mark.parametrize("parallel", [1, 3, 8])
def test_the_answers_are_those_of_one_after_another(model: Model, parallel: int, always_shared: None) -> None:
    expected = [model.generate(question, **SAMPLED) for question in QUESTIONS]
    assert len(set(expected)) > 3
    before = model.stats.copy()
    assert list(model.generate_many(QUESTIONS, parallel=parallel, **SAMPLED)) == expected
    rows = model.stats.since(before).rows_per_pass
    assert rows == 1 if parallel == 1 else rows > 2


def test_prompts_are_read_as_they_are_needed(model: Model) -> None:
    """And they may be conversations."""
    read: list[int] = []

    def prompts() -> Iterator[Any]:
        for number in range(1000):
            read.append(number)
            yield [{"role": "user", "content": f"Number {number}?"}]

    answers = model.generate_many(prompts(), parallel=2, temperature=0, max_new_tokens=4)
    assert next(answers) == model.generate("Number 0?", temperature=0, max_new_tokens=4)
    assert len(read) <= 4
    answers.close()  # type: ignore[attr-defined]
    assert not list(model.generate_many([]))


def test_an_error_comes_in_its_place(model: Model) -> None:
    prompts = ["One?", [{"role": "wizard", "content": "x"}], "Three?"]
    answers = model.generate_many(prompts, temperature=0, max_new_tokens=4)
    assert next(answers) == model.generate("One?", temperature=0, max_new_tokens=4)
    with pytest.raises(ConfigError, match="not usable"):
        next(answers)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("Hello", {}, "list"),
        (["Hello"], {"parallel": 0}, "parallel"),
        (["Hello"], {"top_p": 2}, "top_p"),
        (7, {}, "list"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_computed(
    model: Model, prompts: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        model.generate_many(prompts, **settings)


def test_a_closed_model_answers_nothing(tmp_path: Path) -> None:
    with open_tiny(tmp_path) as model:
        answers = model.generate_many(QUESTIONS, parallel=2, temperature=0, max_new_tokens=12)
        assert next(answers)
    with pytest.raises(ModelClosed):
        list(answers)
    with pytest.raises(ModelClosed):
        model.generate_many(QUESTIONS)


class Memory:
    """Has room for so many answers of five steps; one more of them finds out at its third step."""

    def __init__(self, room: int) -> None:
        self.room, self.running, self.most = room, set[str](), 0

    def begin(self, prompt: Any) -> Generator[Piece | None, None, None]:
        try:
            for step in range(5):
                self.running.add(prompt)
                self.most = max(self.most, len(self.running))
                if step == 2 and len(self.running) > self.room:
                    raise BudgetError("no room")
                yield Piece("answer", f"{prompt}{step}")
                yield None
        finally:
            self.running.discard(prompt)


def test_what_memory_has_no_room_for_waits_for_an_end() -> None:
    memory = Memory(2)
    got = list(Many(memory.begin, "abcdefg", 4).answers())
    assert got == ["".join(f"{prompt}{step}" for step in range(5)) for prompt in "abcdefg"]
    assert memory.most == 4
    assert not memory.running
    with pytest.raises(BudgetError):
        list(Many(Memory(0).begin, "ab", 4).answers())
