"""Tokens that passes of the card choose, on the fake driver: the CPU's where they are greedy, else the draw's."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_model import CardModel, card_model, store_of
from support.cuda import fake, shim
from support.guesses import compute_guesses
from support.models import open_model
from support.tiny_models import tiny_model, tiny_prompt
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from offload_moe.card.model import decoder_parts
from offload_moe.card.steps import CardSteps
from offload_moe.card.stops import Stops
from offload_moe.chat import ahead
from offload_moe.chat.steering import Steering
from offload_moe.chat.stream import TokenStream
from offload_moe.decode import takes_rows
from offload_moe.decode.cache import give_room
from offload_moe.errors import BudgetError, DevicePassUnavailable, TransferError
from offload_moe.families.cache_name import with_cache
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.speculate.speculation import Speculation
from offload_moe.speculate.speculator import Speculator
from tests.integration import test_speculation as rejections
from tests.unit import test_card_choose as definition

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

NUM_PROMPT, NUM_NEW, NUM_LAYERS, ALL = 9, 6, 3, 24
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module")
def expected(card_store: Path) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens of the CPU, and their logits."""
    seen: list[Tensor] = []
    with open_model(card_store) as model:
        return tokens_of(model.hf, steering=Steering(observe=seen.append)), seen


@pytest.fixture
def model(card_store: Path) -> Iterator[CardModel]:
    with fake.FakeDriver() as driver, card_model(card_store, driver, ALL, ALL) as model:
        yield model


def tokens_of(
    hf: Any,
    seed: int | None = None,
    steering: Steering | None = None,
    speculator: Speculator | None = None,
    **settings: Any,
) -> list[int]:
    settings = {"do_sample": False, "max_new_tokens": NUM_NEW, **settings}
    config = GenerationConfig(eos_token_id=None, pad_token_id=0, disable_compile=True, **settings)
    ids, _ = tiny_prompt(1, NUM_PROMPT)
    with TokenStream(hf, ids, config, seed=seed, steering=steering or Steering(), speculator=speculator) as stream:
        return list(stream)


def counts(model: CardModel) -> tuple[int, int]:
    """Tokens chosen on the card, and from its logits."""
    counters = model.engine.hierarchy.counters
    return counters.num_chosen_on_card, counters.num_chosen_from_logits


def test_greedy_tokens_are_the_cpus_and_cost_no_call_of_torchs_head(
    model: CardModel, expected: tuple[list[int], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_of(model.hf)  # every expert it takes is on the card now
    model.driver.forget_counts()
    assert tokens_of(model.hf) == expected[0]
    num_passes = NUM_NEW - 1
    assert counts(model) == (2 * num_passes, 2)  # the first token is chosen from the logits of a prompt
    assert model.driver.count("cuGraphLaunch") == num_passes * (2 * NUM_LAYERS + 2)
    assert model.driver.count("copies") == num_passes
    assert model.driver.count("cuStreamSynchronize") == 0
    assert model.driver.count("cuLaunchKernel") == 1  # edits: a token behind one that the card chose needs none


def test_a_card_that_is_lost_in_a_prompt_has_the_error_of_one_that_is_lost_in_a_pass(model: CardModel) -> None:
    def fail(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ...")

    model.hf.get_decoder().layers[1].register_forward_hook(fail)
    with pytest.raises(TransferError, match=r"^The card was lost: CUDA error: unspecified launch failure\. It was"):
        tokens_of(model.hf)


@pytest.mark.parametrize("mode", ["queued", pytest.param("stepwise", marks=pytest.mark.slow)])
def test_a_drawn_token_depends_on_logits_seed_and_position_alone(mode: Any, card_store: Path) -> None:
    draw = definition.Draw(temperature=0.7, top_k=20, top_p=0.9)
    with fake.FakeDriver() as driver, card_model(card_store, driver, 6, 5) as model:
        model.card.mode.mode = mode
        found = tokens_of(model.hf, definition.SEED, **SAMPLED)
        assert counts(model) == (NUM_NEW, 0)
    with open_model(card_store) as cpu:
        logits = logits_before(cpu.hf, found)
    wanted = [definition.drawn(row.numpy(), draw, NUM_PROMPT - 1 + number) for number, row in enumerate(logits)]
    assert found == wanted
    assert found != [int(row.argmax()) for row in logits]


def logits_before(hf: Any, tokens: list[int]) -> list[Tensor]:
    """``[V]`` before each of these tokens."""
    cache, (ids, _) = DynamicCache(config=hf.config), tiny_prompt(1, NUM_PROMPT)
    give_room(cache, 512, torch.bfloat16)
    with torch.inference_mode():
        rows = [
            hf(input_ids=part, **with_cache(cache)).logits[0, -1]
            for part in (ids, *torch.tensor([[tokens]]).unbind(-1))
        ]
    return rows[:-1]


@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, pytest.param(SAMPLED | {"temperature": 0.4}, marks=pytest.mark.slow)]
)
def test_guesses_change_no_token(settings: dict[str, Any], model: CardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess is a row of a pass, whose token the card chooses, too."""
    compute_guesses(monkeypatch, 1)
    plain = tokens_of(model.hf, 4, max_new_tokens=16, **settings)
    counters = model.engine.hierarchy.counters
    num_plain, speculation = counters.num_chosen_on_card, Speculation(model.hf, "ngram", counters)
    assert speculation.why_off == ""
    assert speculation.may_share
    assert Speculation(model.hf, "mtp", why_off="that layer is elsewhere").conversation() is None
    model.driver.forget_counts()
    assert tokens_of(model.hf, 4, speculator=speculation.conversation(), max_new_tokens=16, **settings) == plain
    assert 0 < counters.num_right_guesses < counters.num_guesses
    assert counters.num_chosen_on_card == 2 * num_plain
    num_waits = 3 + int(bool(settings["do_sample"]))  # behind the prompt: rows that are taken back keep their rooms
    assert model.driver.count("cuCtxSynchronize") == num_waits


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_guesses_behind_windows_latents_and_states(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_guesses(monkeypatch, 3)
    store = store_of(family, tmp_path)
    with open_model(store) as cpu:
        wanted = tokens_of(cpu.hf, max_new_tokens=60)
    with fake.FakeDriver() as driver, card_model(store, driver, 12, 9, shim_mode="quick") as model:
        counters = model.engine.hierarchy.counters
        speculator = Speculation(model.hf, "ngram", counters).conversation()
        assert tokens_of(model.hf, speculator=speculator, max_new_tokens=60) == wanted
    assert counters.num_guesses > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss"])
def test_every_pattern_of_rejections_leaves_the_caches_of_passes_without_guesses(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 to 7 guesses, of which all numbers are right: tokens and, after each rejection, caches bit for bit."""
    roll_back, num_rolled = ahead.roll_back, Counter[int]()
    settings = {"repetition_penalty": 1.5, "max_new_tokens": 180}
    with (
        fake.FakeDriver() as driver,
        card_model(store_of(family, tmp_path), driver, ALL, ALL, shim_mode="quick") as model,
    ):
        tokens, seen = rejections.step_by_step(model, **settings)

        def checked(cache: DynamicCache, num_tokens: int) -> None:
            roll_back(cache, num_tokens)
            num_rolled[num_tokens] += 1
            rejections.check_cache(cache, seen[cache.get_seq_length()])

        monkeypatch.setattr(ahead, "roll_back", checked)
        source, cache = rejections.Recalled(tokens), DynamicCache(config=model.hf.config)
        driver.forget_counts()
        assert list(rejections.stream_of(model, source, cache=cache, **settings)) == tokens
        assert driver.count("cuGraphLaunch") > 0
        rejections.check_cache(cache, seen[cache.get_seq_length()])
    assert set(source.made) == set(rejections.PATTERNS)
    assert set(num_rolled) == set(range(1, MAX_ROWS))
    assert len(set(tokens)) > 4


def test_where_there_is_no_memory_for_more_rows_none_are_guessed(
    model: CardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.card.has_graphs(1)
    monkeypatch.setattr(CardSteps, "__init__", refuse)
    assert not model.card.has_graphs(3)
    assert not model.card.has_graphs(8)
    cache = DynamicCache(config=model.hf.config)
    give_room(cache, 512, torch.bfloat16)
    with torch.inference_mode():
        model.hf(input_ids=tiny_prompt(1, NUM_PROMPT)[0], **with_cache(cache))
        assert takes_rows(model.hf, cache, 1)
        assert not takes_rows(model.hf, cache, 3)


def refuse(self: CardSteps, *_: Any) -> None:
    raise BudgetError("The device refused it.")


def test_without_a_seed_torchs_random_numbers_decide(model: CardModel) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(tokens_of(model.hf, **SAMPLED, max_new_tokens=3))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.6}, SAMPLED | {"min_p": 0.01}])
def test_other_processors_choose_from_logits_of_the_card(
    settings: dict[str, Any], model: CardModel, card_store: Path
) -> None:
    with open_model(card_store) as cpu:
        wanted = tokens_of(cpu.hf, 5, **settings)
    assert tokens_of(model.hf, 5, **settings) == wanted
    assert counts(model) == (0, NUM_NEW)
    assert model.engine.hierarchy.counters.choice_s > 0


def test_an_observer_sees_the_cpus_logits(model: CardModel, expected: tuple[list[int], list[Tensor]]) -> None:
    seen: list[Tensor] = []
    assert tokens_of(model.hf, steering=Steering(observe=seen.append)) == expected[0]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen, expected[1], strict=True))


def test_forced_tokens_pass_together_with_the_one_before(model: CardModel, card_store: Path) -> None:
    found = []
    with open_model(card_store) as cpu:
        for hf in (cpu.hf, model.hf):
            runs = iter([[7, 9, 11], *[[]] * NUM_NEW])
            found.append(tokens_of(hf, steering=Steering(forced=lambda runs=runs: next(runs))))
    assert found[0] == found[1]
    assert found[1][1:4] == [7, 9, 11]
    assert counts(model) == (NUM_NEW - 1 - 3, 1)


def test_hooks_of_the_model_and_its_head_are_called(model: CardModel, expected: tuple[list[int], list[Tensor]]) -> None:
    seen: list[Any] = []
    for module in (model.hf, model.hf.lm_head):
        handle = module.register_forward_hook(lambda *args: seen.append(args[-1]))
        assert tokens_of(model.hf) == expected[0]
        handle.remove()
    assert len(seen) == 2 * NUM_NEW
    assert tokens_of(model.hf) == expected[0]
    assert counts(model)[0] == NUM_NEW - 1


def test_tokens_behind_passes_that_were_given_up_or_went_elsewhere(
    card_store: Path, expected: tuple[list[int], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = Stops.make_possible
    interrupted = []

    def interrupt(self: Stops, *args: Any) -> Any:
        interrupted.append(args)
        if len(interrupted) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Stops, "make_possible", interrupt)
    with fake.FakeDriver() as driver, card_model(card_store, driver, 6, 5) as model:
        model.card.mode.mode = "queued"
        with pytest.raises(KeyboardInterrupt):
            tokens_of(model.hf, **SAMPLED)
        assert tokens_of(model.hf) == expected[0]
    num_passed = 3
    with (
        fake.FakeDriver() as driver,
        card_model(card_store, driver, ALL, ALL, context=NUM_PROMPT + num_passed) as model,
    ):
        drawn = tokens_of(model.hf, 3, **SAMPLED)
        assert counts(model) == (NUM_NEW, 0)  # those behind the planned context from logits of modules
        assert tokens_of(model.hf, 3, **SAMPLED) == drawn
        assert tokens_of(model.hf) == expected[0]


def test_a_model_that_changes_its_logits_keeps_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_model("qwen3_moe")
    head = decoder_parts(hf).head
    assert head is not None
    assert head.record.data_ptr() != 0
    forward = hf.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    monkeypatch.setattr(hf, "forward", scaled)
    parts = decoder_parts(hf)
    assert parts.head is None
    assert "other numbers" in parts.why_no_head


def test_numbers_in_fp16_have_no_kernel() -> None:
    with pytest.raises(DevicePassUnavailable, match=r"an embedding in torch\.float16 has no kernel"):
        decoder_parts(tiny_model("qwen3_moe").half())
