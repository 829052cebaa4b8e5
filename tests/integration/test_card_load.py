"""`load` to text through the device pass, on the fake driver; and the line that says why there is none."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from offload_moe_cli.status import full_statistics
from support.card_machine import card_machine
from support.card_model import store_of
from support.chat import chat_store
from support.cuda import fake, shim

import offload_moe.engine.load as engine_load
from offload_moe import load
from offload_moe.card.device import CardDevice
from offload_moe.engine.device_pass import DevicePass, open_device_pass
from offload_moe.engine.model import Model
from offload_moe.errors import BudgetError
from offload_moe.plan.machine import Machine
from offload_moe.plan.parameters import ModelShape
from offload_moe.store import Store

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")
CARD = Machine(ram_bytes=1 << 30, vram_bytes=1 << 30)
SETTINGS: dict[str, Any] = {"prefetch": 0, "context": 256, "dense_codec": "int8"}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[CardDevice]:
    with card_machine(monkeypatch) as device:
        yield device


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def linear_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of("qwen3_next", tmp_path_factory.mktemp("stores"))


def test_text(store: Path, card: CardDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through chat, with the usual stops: greedy the same answer as on the CPU; sampled one that its seed repeats."""
    phases: list[str] = []
    with load(store, **SETTINGS, progress=lambda phase, *_: phases.append(phase)) as model:
        assert str(model.fast_path).startswith("Decode takes the device pass through all")
        found = answers(model)
        assert answers(model) == found
        counters = model.stats
        assert counters.num_acquires > 0
        session = model.chat()
        assert "".join(piece.text for piece in session.send("Hello", temperature=0, max_new_tokens=7)) == found[0]
        rows = dict(full_statistics(session.last_stats, {}))
        assert rows["chosen on the card"] == "6 tokens"
        assert re.fullmatch(r"[1-6], \d+\.\d ms each", rows["queued passes"])
        assert rows["chosen from its logits"].startswith("1 tokens, ")  # the first one, from those of the prompt
    assert {"Compiling the kernels of the device pass", "Locking RAM for the card"} <= set(phases)
    monkeypatch.undo()
    with load(store, **SETTINGS) as model:
        assert not str(model.fast_path).startswith("Decode takes the device pass")
        assert answers(model)[0] == found[0]


DEEPSEEK = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "num_key_value_heads": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("dense_codec", ["int8", "bf16"])
def test_text_of_deepseek(dense_codec: str, card: CardDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents, a dense layer, groups and a shared expert, through the whole product."""
    store, settings = chat_store(tmp_path, "deepseek_v3", **DEEPSEEK), SETTINGS | {"dense_codec": dense_codec}
    with load(store, **settings) as model:
        assert str(model.fast_path).startswith("Decode takes the device pass through all")
        assert not [notice for notice in model.notices if "device pass" in notice]
        found = answers(model)
        assert model.stats.num_chosen_on_card > 10
    monkeypatch.undo()
    with load(store, **settings) as model:
        assert answers(model)[0] == found[0]


def answers(model: Model) -> list[str]:
    settings: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.8, "seed": 3}]
    texts = ["".join(piece.text for piece in model.chat().send("Hello", max_new_tokens=7, **each)) for each in settings]
    assert all(texts)
    return texts


def test_of_several_cards_a_line_names_the_one_that_is_used() -> None:
    made: Any = SimpleNamespace(parts=SimpleNamespace(why_no_head=""))
    for num_cards, lines in (
        (1, []),
        (3, ["This machine has 3 cards; cuda:1 (Fake card) is used. --device chooses another."]),
    ):
        card: Any = SimpleNamespace(num_cards=num_cards, number=1, name="Fake card")
        assert DevicePass(card=card, made=made).notices == lines


@pytest.mark.parametrize(("name", "number"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_the_pass_is_on_the_card_that_torch_has(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    open_card = CardDevice.open
    with fake.FakeDriver(num_cards=2) as driver:
        monkeypatch.setattr(CardDevice, "open", partial(open_card, driver.path, fake.nvrtc()))
        opened = open_device_pass(torch.device(name), why_off="")
        assert opened.card is not None
        assert opened.card.number == number
        opened.card.session.close()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"why_off": "it is off"}, "it is off"),
        ({"why_off": ""}, "there is no libcuda.so.1"),
    ],
)
def test_why_there_is_none(settings: dict[str, str], reason: str) -> None:
    opened = open_device_pass(torch.device("cuda"), **settings)
    (notice,) = opened.notices
    assert reason in notice
    assert opened.card is None


@pytest.mark.parametrize(
    ("options", "takes_it"),
    [({}, True), ({"exact": True}, False), ({"dtype": "fp16"}, False), ({"device_pass": "off"}, False)],
)
def test_a_pass_that_is_not_taken_is_not_planned(
    options: dict[str, Any], takes_it: bool, linear_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its graphs, nor the states of linear attention that tokens of its rows go back to."""
    planned: list[tuple[ModelShape, bool]] = []

    def place(_: Store, shape: ModelShape, *, device_pass: bool, **__: Any) -> None:
        planned.append((shape, device_pass))
        raise BudgetError("Nothing is loaded.")

    monkeypatch.setattr(engine_load, "fit", place)
    monkeypatch.setattr(engine_load, "compute_device", torch.device)
    monkeypatch.setattr(engine_load, "measure_load", lambda _, *, dtype, **__: replace(CARD, chosen_dtype=dtype))
    with pytest.raises(BudgetError, match="Nothing is loaded"):
        load(linear_store, **({"device": "cuda", "dtype": "bf16"} | options))
    ((shape, has_pass),) = planned
    assert has_pass == takes_it
    assert any(layer.earlier for layer in shape.attention.cache_layers) == takes_it
