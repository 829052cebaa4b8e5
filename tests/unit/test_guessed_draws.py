"""Sampled tokens have the model's distribution whatever is guessed: many draws, of a model whose distribution is known.

The model is a chain: the logits behind a token are those of the last token in the cache.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from offload_moe.chat import ahead
from offload_moe.chat.ahead import GuessedRows
from offload_moe.chat.choice import Choice
from offload_moe.chat.steering import Steering
from offload_moe.residency.counters import Counters
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.governor import EveryGuess
from offload_moe.speculate.guess import MOST_GUESSES, Guess
from offload_moe.speculate.speculator import Speculator

V = 4  # tokens
LOGITS = torch.randn(V, V, generator=torch.Generator().manual_seed(2))  # by the token before
PROMPT = [0, 1]
Rule = Callable[[Sequence[int]], int]  # the token that is guessed behind some


def likeliest(ids: Sequence[int]) -> int:
    return int(LOGITS[ids[-1]].argmax())


def unlikeliest(ids: Sequence[int]) -> int:
    return int(LOGITS[ids[-1]].argmin())


def as_long_as_ago(ids: Sequence[int]) -> int:
    """Depends on what was drawn before."""
    return ids[-7] if len(ids) > 7 else 0


RULES: list[Rule] = [likeliest, unlikeliest, as_long_as_ago]


class Guesser:
    """As many tokens as is drawn, by a rule."""

    certainties = (0.5,)
    is_free = False

    def __init__(self, rule: Rule) -> None:
        self._rule, self._ids, self._random = rule, list[int](), np.random.default_rng(0)

    def begin(self, ids: Sequence[int]) -> None:
        self._ids = [*ids]

    def take(self, token: int) -> None:
        self._ids.append(token)

    def guess(self, most: int) -> Guess:
        ids = [*self._ids]
        for _ in range(self._random.integers(1, most + 1)):
            ids.append(self._rule(ids))
        return Guess(tuple(ids[len(self._ids) :]))


class Chain:
    """The sequence, and the cache of a model."""

    def __init__(self) -> None:
        self.ids, self.cached = [*PROMPT], PROMPT[:-1]

    def compute(self, num_new: int, guesses: Sequence[int]) -> list[Tensor]:
        found = []
        for number, token in enumerate((*self.ids[len(self.ids) - num_new :], *guesses)):
            self.cached.append(token)
            if number >= num_new - 1:
                found.append(LOGITS[self.cached[-1]][None])
        return found

    def take_back(self, cache: object, number: int) -> None:
        assert 0 < number <= MOST_GUESSES + 1
        del self.cached[-number:]


def draw(monkeypatch: pytest.MonkeyPatch, rule: Rule, num_tokens: int, seed: int | None = None) -> list[int]:
    """The tokens of an answer, as the step loop draws them."""
    chain, counters = Chain(), Counters()
    monkeypatch.setattr(ahead, "takes_rows", lambda hf, cache, num_rows: True)
    monkeypatch.setattr(ahead, "roll_back", chain.take_back)
    monkeypatch.setattr(ahead, "keep_next", lambda cache: None)
    monkeypatch.setattr(ahead, "sharing_of", lambda hf: None)
    monkeypatch.setattr(ahead, "speculation_of", lambda hf: SimpleNamespace(counters=counters))
    speculator = Speculator(Guesser(rule), PassCosts(), counters, EveryGuess())
    speculator.begin(PROMPT)
    rows = GuessedRows(None, None, chain.compute, speculator=speculator)  # type: ignore[arg-type]
    choice = Choice(LogitsProcessorList(), Steering(), None, is_sampled=True, seed=seed, device=torch.device("cpu"))
    found = chain.compute(1, ())[0]
    for left in reversed(range(num_tokens)):
        token = choice.choose(lambda: torch.tensor([chain.ids]), len(chain.ids), found)
        chain.ids.append(token)
        rows.follow(token)
        if left:
            found = rows.next(left - 1)
    rows.take_back()
    assert chain.cached == chain.ids[:-1]
    assert 0 < counters.num_right_guesses < counters.num_guesses
    return chain.ids[len(PROMPT) :]


def distance(tokens: Sequence[int]) -> float:
    """By how many standard deviations the chi-square statistic of all pairs is above what it is expected to be."""
    counts = np.zeros((V, V))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    expected = LOGITS.softmax(-1).numpy() * counts.sum(-1, keepdims=True)
    freedom = V * (V - 1)
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@torch.inference_mode()
@pytest.mark.parametrize(("rule", "seed"), [(likeliest, None), (unlikeliest, 7)])
def test_draws_have_the_models_distribution(rule: Rule, seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    assert abs(distance(draw(monkeypatch, rule, 2_000, seed))) < 4


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("rule", RULES)
def test_many_draws_have_the_models_distribution(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    assert abs(distance(draw(monkeypatch, rule, 40_000))) < 4


@torch.inference_mode()
@pytest.mark.parametrize("seed", [None, 7])
def test_draws_are_the_same_whatever_is_guessed(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for rule in RULES:
        torch.manual_seed(3)
        answers.append(draw(monkeypatch, rule, 200, seed))
    assert answers[0] == answers[1] == answers[2]


@torch.inference_mode()
def test_a_guess_that_is_taken_too_often_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in six is taken whether it was drawn or not."""
    choose, generator = Choice.choose, np.random.default_rng(0)

    def biased(self: Choice, ids: Callable[[], Tensor], num_tokens: int, found: Tensor) -> int:
        token = choose(self, ids, num_tokens, found)
        return int(found.argmax()) if generator.random() < 1 / 6 else token

    monkeypatch.setattr(Choice, "choose", biased)
    torch.manual_seed(1)
    assert distance(draw(monkeypatch, likeliest, 2_000)) > 4
