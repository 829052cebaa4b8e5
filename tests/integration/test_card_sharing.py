"""Answers that share passes of the card, on the fake driver: each is the one that it is alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_model import CardModel, card_model
from support.cuda import fake, shim
from support.models import open_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from offload_moe.card.stops import Stops
from offload_moe.chat.stream import TokenStream
from offload_moe.decode import next_logits, takes_rows, takes_several
from offload_moe.decode.cache import give_room
from offload_moe.errors import TransferError, UnsupportedModelError
from offload_moe.families.cache_name import with_cache
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.row_governor import RowGovernor

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

LENGTHS = (9, 3, 6)  # of prompts
NUM_NEW = (7, 4, 6)


@pytest.fixture
def model(card_store: Path) -> Iterator[CardModel]:
    with fake.FakeDriver() as driver, card_model(card_store, driver, 24, 12, shim_mode="quick") as model:
        yield model


def prompt(number: int) -> Tensor:
    return torch.randint(3, 120, (1, LENGTHS[number]), generator=torch.Generator().manual_seed(number))


def caches_of(hf: Any) -> list[DynamicCache]:
    """Behind each prompt."""
    found = []
    for number in range(len(LENGTHS)):
        cache = DynamicCache(config=hf.config)
        give_room(cache, 512, torch.bfloat16)
        hf.get_decoder()(input_ids=prompt(number), **with_cache(cache), use_cache=True)
        found.append(cache)
    return found


@torch.inference_mode()
def logits_alone(hf: Any, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """Behind each of the tokens ``[pass][sequence]``."""
    caches = caches_of(hf)
    return [
        torch.cat(
            [
                hf(input_ids=torch.tensor([[token]]), **with_cache(cache)).logits[0]
                for token, cache in zip(row, caches, strict=True)
            ]
        )
        for row in tokens
    ]


@pytest.mark.parametrize("mode", ["queued", pytest.param("stepwise", marks=pytest.mark.slow)])
def test_one_pass_has_the_bits_of_passes_of_each(mode: Any, model: CardModel, card_store: Path) -> None:
    tokens = [[5, 50, 77], [6, 9, 31], [88, 7, 12]]
    with open_model(card_store) as cpu:
        expected = logits_alone(cpu.hf, tokens)
    model.card.mode.mode = mode
    with torch.inference_mode():
        caches = caches_of(model.hf)
        for row, wanted in zip(tokens, expected, strict=True):
            assert all(takes_rows(model.hf, cache, 1) for cache in caches)
            assert torch.equal(next_logits(model.hf, row, caches), wanted)
        assert [cache.get_seq_length() for cache in caches] == [length + 3 for length in LENGTHS]
        # Other sequences, another order, and one alone behind them: positions and rooms are those of each.
        again = caches_of(model.hf)
        assert torch.equal(next_logits(model.hf, tokens[0][::-1], again[::-1]), expected[0].flip(0))
        assert torch.equal(next_logits(model.hf, tokens[1][1:2], again[1:2]), expected[1][1:2])


def test_a_pass_that_fails_leaves_the_caches_as_they_were(
    model: CardModel, card_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [[5, 50, 77]]
    with open_model(card_store) as cpu:
        (expected,) = logits_alone(cpu.hf, tokens)

    def fail(*_: Any) -> None:
        raise TransferError("an expert of one of them cannot be read")

    with torch.inference_mode():
        caches = caches_of(model.hf)
        with monkeypatch.context() as patch:
            patch.setattr(Stops, "make_possible", fail)
            patch.setattr(model.card.tables.sources, "publish", lambda *_: None)  # nothing can be fetched
            model.card.end_loans()
            with pytest.raises(TransferError, match="cannot be read"):
                next_logits(model.hf, tokens[0], caches)
        assert [cache.get_seq_length() for cache in caches] == list(LENGTHS)
        assert torch.equal(next_logits(model.hf, tokens[0], caches), expected)


def test_what_a_pass_does_not_take_is_refused(model: CardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        (cache, *_) = caches_of(model.hf)
        with pytest.raises(UnsupportedModelError, match="each alone"):
            next_logits(model.hf, [5, 6], [cache, cache])

    assert takes_several(model.hf, 3)
    monkeypatch.setattr(model.card, "has_graphs", lambda num_rows: num_rows < 3)  # as where memory is refused
    assert not takes_several(model.hf, 3)


def answers(hf: Any, together: bool, **settings: Any) -> list[list[int]]:
    """Tokens of each, a token of each at a time, or one after another."""
    streams = []
    for number, num_new in enumerate(NUM_NEW):
        config = GenerationConfig(
            eos_token_id=1000, pad_token_id=0, disable_compile=True, max_new_tokens=num_new, **settings
        )
        cache = DynamicCache(config=hf.config)
        streams.append(TokenStream(hf, prompt(number), config, cache=cache, seed=number))
    left = streams
    while left:
        begun = left if together else left[:1]
        left = [stream for stream in begun if next(stream, None) is not None] + left[len(begun) :]
    return [stream.tokens for stream in streams]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"do_sample": False}, marks=pytest.mark.slow),
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    ],
)
def test_answers_at_once_are_those_of_each(
    settings: dict[str, Any], model: CardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled ones, too: a draw depends on logits, seed and position."""
    alone = answers(model.hf, together=False, **settings)
    monkeypatch.setattr(RowGovernor, "choose", lambda self, most: min(most, MAX_ROWS))
    monkeypatch.setattr(RowGovernor, "rate", lambda self, num_rows: float(num_rows))
    counted: list[int] = []
    run = model.card.run
    monkeypatch.setattr(model.card, "run", lambda *args: (counted.append(len(args[0])), run(*args))[1])
    assert answers(model.hf, together=True, **settings) == alone
    assert 3 in counted
    assert sum(counted) == sum(NUM_NEW) - len(NUM_NEW)
