"""Top-p without sorting keeps what transformers keeps; draws without a seed have the model's distribution."""

from itertools import product
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload_moe.chat.choice import Choice, drawn
from offload_moe.chat.steering import NO_STEERING
from offload_moe.chat.top_p import NUM_LIKELIEST, TopP, likeliest
from offload_moe.errors import CheckpointError, ConfigError

VOCABULARY = 20_000
SHARES = (1e-6, 0.1, 0.5, 0.8, 0.95, 0.999, 1 - 1e-6)
NO_IDS = torch.empty(1, 0, dtype=torch.int64)


def logits(seed: int, spread: float) -> torch.Tensor:
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def agree(scores: torch.Tensor, top_p: float, **more: Any) -> bool:
    warper = TopPLogitsWarper(top_p, **more)
    return torch.equal(TopP(warper)(NO_IDS, scores), warper(NO_IDS, scores))


@pytest.mark.parametrize(("spread", "top_p"), list(product((0.1, 3.0, 8.0), SHARES)))
def test_the_same_tokens_are_kept(spread: float, top_p: float) -> None:
    for seed in range(4):
        scores = logits(seed, spread)
        assert agree(scores, top_p)
        assert agree(TopKLogitsWarper(20)(NO_IDS, scores), top_p)


@pytest.mark.parametrize("top_p", SHARES)
def test_equal_scores_are_kept_as_transformers_keeps_them(top_p: float) -> None:
    assert agree(logits(0, 8.0).round(), top_p)
    assert agree(torch.zeros(1, VOCABULARY), top_p)
    assert agree(torch.full((1, VOCABULARY), -torch.inf).index_fill_(1, torch.tensor([3, 9, 77]), 2.0), top_p)


def test_a_few_are_kept_where_the_caller_wants_so_many() -> None:
    for least in (1, 2, 50, 5000):
        assert agree(logits(0, 8.0), 0.3, min_tokens_to_keep=least, filter_value=-1e9)


def test_the_vocabulary_is_sorted_only_where_it_must_be() -> None:
    peaked = logits(1, 8.0)
    kept = likeliest(peaked[0], 0.95)
    assert kept is not None
    assert 1 < kept.shape[0] < NUM_LIKELIEST
    assert likeliest(TopKLogitsWarper(20)(NO_IDS, logits(1, 0.1))[0], 0.95) is not None
    assert likeliest(logits(1, 0.1)[0], 0.95) is None, "too many tokens"
    quarters = torch.full((VOCABULARY,), -torch.inf).index_copy_(0, torch.arange(4), torch.zeros(4))
    assert likeliest(quarters, 0.5) is None, "their sum is the very share"
    assert likeliest(quarters, 0.6) is None, "which of the equal ones are kept depends on the order"
    assert likeliest(quarters.fill_(torch.nan), 0.5) is None


def test_draws_without_a_seed_follow_the_probabilities() -> None:
    torch.manual_seed(0)
    probabilities = torch.zeros(1, 1000)
    probabilities[0, [1, 400, 999]] = torch.tensor([0.5, 0.2, 0.3])
    counts = torch.zeros(1000)
    for _ in range(4000):
        counts[drawn(probabilities, None)] += 1
    squares = (counts - 4000 * probabilities[0]).square()[[1, 400, 999]] / (4000 * probabilities[0, [1, 400, 999]])
    assert counts[[1, 400, 999]].sum() == 4000
    assert squares.sum() < 13.8, "chi square with two degrees of freedom, one in a thousand"


@pytest.mark.parametrize(("number", "token"), [(0.0, 998), (1 - 2**-24, 1)])
def test_the_least_and_the_greatest_number_draw_tokens_that_are_possible(
    number: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    probabilities = torch.zeros(1, 1000)
    probabilities[0, [1, 400, 998]] = torch.tensor([0.5, 0.2, 0.3])
    monkeypatch.setattr(torch, "rand", lambda size: torch.tensor(number))
    assert drawn(probabilities, None) == token


def choose(scores: torch.Tensor, *processors: Any, is_sampled: bool) -> int:
    choice = Choice(
        LogitsProcessorList(processors), NO_STEERING, None, is_sampled=is_sampled, seed=None, device=scores.device
    )
    return choice.choose(lambda: NO_IDS, 0, scores)


@pytest.mark.parametrize("is_sampled", [True, False])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error_of_the_model(number: float, *, is_sampled: bool) -> None:
    scores = logits(0, 1.0)
    scores[0, 7] = number
    if number == torch.inf and not is_sampled:
        assert choose(scores, is_sampled=False) == 7
        return
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        choose(scores, is_sampled=is_sampled)


@pytest.mark.parametrize("is_sampled", [True, False])
def test_settings_that_forbid_every_token_are_an_error_of_theirs(*, is_sampled: bool) -> None:
    scores = logits(0, 1.0)
    scores[0, 7] = -torch.inf  # a model may rule tokens out itself
    with pytest.raises(ConfigError, match="forbid every token"):
        choose(scores, SuppressTokensLogitsProcessor(range(VOCABULARY)), is_sampled=is_sampled)
