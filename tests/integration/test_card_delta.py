"""Linear attention in the device pass, on the fake driver: the CPU's bits, also of states that go back."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_model import CardModel, card_model, store_of
from support.cuda import fake, shim
from support.models import open_model
from support.tiny_models import tiny_prompt
from torch import Tensor
from transformers import DynamicCache

from offload_moe.card.states import give_back
from offload_moe.decode import keep_next, next_logits, roll_back, takes_rows
from offload_moe.decode.cache import give_room
from offload_moe.decode.states import StatesLayer
from offload_moe.errors import TransferError
from offload_moe.families.cache_name import with_cache
from tests.integration.test_card_pass import check_tables
from tests.support.passes import contents

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")]

NUM_PROMPT, ALL, MOST_ROWS = 9, 32, 4
TOKENS = [5, 11, 7, 3, 19, 2, 23, 8, 6, 13, 4, 17]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of("qwen3_next", tmp_path_factory.mktemp("stores"))


@contextmanager
def on_card(store: Path, num_vram: int = ALL, shim_mode: str = "quick") -> Iterator[CardModel]:
    with fake.FakeDriver() as driver, card_model(store, driver, 12, num_vram, shim_mode=shim_mode) as model:
        yield model


def after_prompt(hf: Any, length: int = NUM_PROMPT) -> Any:
    cache, (ids, _) = DynamicCache(config=hf.config), tiny_prompt(1, length)
    give_room(cache, 512, torch.bfloat16)
    hf(input_ids=ids, **with_cache(cache), use_cache=True)
    return cache


def passed(hf: Any, cache: Any, tokens: list[int]) -> Tensor:
    found: Tensor = hf.get_decoder()(
        input_ids=torch.tensor([tokens]), **with_cache(cache), use_cache=True
    ).last_hidden_state[0]
    return found.clone()


def are_same(cache: Any, other: Any) -> bool:
    pairs = zip(contents(cache), contents(other), strict=True)
    return all(torch.equal(*parts) for mine, theirs in pairs for parts in zip(mine, theirs, strict=True))


def states_of(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if isinstance(layer, StatesLayer)]


@pytest.mark.parametrize("mode", ["queued", "stepwise"])
def test_guesses_that_are_taken_back_leave_the_cpus_states(mode: Any, store: Path) -> None:
    """Rejected at every length, with few slots; between them tokens in place."""
    with open_model(store) as cpu, torch.inference_mode():
        wanted, expected = guessed(cpu.hf)
    with on_card(store, 5) as model, torch.inference_mode():
        model.card.mode.mode = mode
        found, cache = guessed(model.hf)
        check_tables(model)
    assert torch.equal(found, wanted)
    assert are_same(cache, expected)


def guessed(hf: Any) -> tuple[Tensor, Any]:
    """What passes of 1 to 4 rows give, of which any number counts, and the cache behind them."""
    cache, found = after_prompt(hf), []
    for num_rows in range(1, MOST_ROWS + 1):
        for num_back in range(num_rows):
            assert takes_rows(hf, cache, num_rows)
            if num_rows > 1:
                keep_next(cache)
            found.append(passed(hf, cache, TOKENS[num_back : num_back + num_rows]))
            if num_back:
                roll_back(cache, num_back)
    return torch.cat(found), cache


def test_a_pass_with_guesses_waits_for_nothing(store: Path) -> None:
    """Rows go to other places by edits: only the first such pass, which makes the ring, synchronizes."""
    with on_card(store) as model, torch.inference_mode():
        cache, counts = after_prompt(model.hf), []
        for tokens in ([5], [5, 6], [7, 8], [9], [7, 8]):
            model.driver.forget_counts()
            if len(tokens) > 1:
                keep_next(cache)
            passed(model.hf, cache, tokens)
            if len(tokens) > 1:
                roll_back(cache, 1)
            counts.append(model.driver.count("cuCtxSynchronize"))
        assert counts[2:] == [0, 0, 0]
        assert counts[0] > 0
        assert counts[1] > 0


def test_several_conversations_share_a_pass(store: Path) -> None:
    """Some have guesses behind them, others not; a pass that fails leaves all as they were."""
    found = []
    with open_model(store) as cpu, torch.inference_mode():
        found.append(shared(cpu.hf))
    with on_card(store, 9) as model, torch.inference_mode():
        found.append(shared(model.hf))
        caches, before = found[1][1], [contents(cache) for cache in found[1][1]]
        model.driver.set(lost_after=30)
        with pytest.raises(TransferError):
            next_logits(model.hf, [5, 6, 7], caches)
        model.driver.set(lost_after=-1)
        for cache, parts in zip(caches, before, strict=True):
            assert all(map(torch.equal, *pair) for pair in zip(contents(cache), parts, strict=True))
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(are_same, found[0][1], found[1][1]))


def shared(hf: Any) -> tuple[Tensor, list[Any]]:
    caches, found = [after_prompt(hf, length) for length in (4, 9, 6)], []
    keep_next(caches[1])
    passed(hf, caches[1], [5, 6, 7])
    roll_back(caches[1], 1)
    found += [next_logits(hf, tokens, caches).clone() for tokens in ([5, 6, 7], [9, 8, 7])]
    passed(hf, caches[2], [4])
    found.append(next_logits(hf, [1, 2], caches[1:]).clone())
    return torch.cat(found), caches


def test_states_that_other_code_has_replaced(store: Path) -> None:
    """In one layer, so that its ring is another one than that of the others, and in all of them."""
    found = []
    with open_model(store) as cpu, torch.inference_mode():
        found.append(replaced(cpu.hf))
    with on_card(store) as model, torch.inference_mode():
        found.append(replaced(model.hf))
    assert torch.equal(found[0][0], found[1][0])
    assert are_same(found[0][1], found[1][1])


def replaced(hf: Any) -> tuple[Tensor, Any]:
    cache, found = after_prompt(hf), []
    for layers in (states_of(cache)[1:2], states_of(cache), []):
        keep_next(cache)
        found.append(passed(hf, cache, [5, 6, 7]))
        roll_back(cache, 1)
        for layer in layers:
            layer.recurrent_states[0] = layer.recurrent_states[0] * 2
        found.append(passed(hf, cache, [9]))
    return torch.cat(found), cache


def test_states_of_bf16_modules_are_read_in_fp32_and_given_back(store: Path) -> None:
    """As on a card, whose prompts compute in bf16: inputs of a convolution come and go in that."""
    with on_card(store) as model, torch.inference_mode():
        cache = after_prompt(model.hf)
        for layer in states_of(cache):
            layer.dtype = torch.bfloat16
            layer.keep_in(torch.bfloat16)
        twin = copy.deepcopy(cache)
        for layer in states_of(twin):
            layer.keep_in(torch.float32)
        assert torch.equal(passed(model.hf, cache, [5]), passed(model.hf, twin, [5]))
        assert {layer.conv_states[0].dtype for layer in states_of(cache)} == {torch.float32}
        give_back(cache)
        assert {layer.conv_states[0].dtype for layer in states_of(cache)} == {torch.bfloat16}
        assert {layer.recurrent_states[0].dtype for layer in states_of(cache)} == {torch.float32}
