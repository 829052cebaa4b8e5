"""`load` to text through the device pass, on the fake driver; and the line that says why there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_machine import card_machine
from support.chat import chat_store
from support.cuda import shim
from support.tiny_models import tiny_model

from offload_moe import load
from offload_moe.engine.device_pass import open_device_pass
from offload_moe.engine.model import Model
from offload_moe.store import Store

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")
SETTINGS: dict[str, Any] = {"prefetch": 0, "context": 256, "dense_codec": "int8"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("stores"))


def test_text(store: Path) -> None:
    """The same answer as on the CPU, through chat, with the usual stops; greedy and sampled."""
    phases: list[str] = []
    with card_machine(), load(store, **SETTINGS, progress=lambda phase, *_: phases.append(phase)) as model:
        assert str(model.fast_path).startswith("Decode takes the device pass through all")
        found = answers(model)
        counters = model.stats
        assert counters.num_acquires > 0
    assert {"Compiling the kernels of the device pass", "Locking RAM for the card"} <= set(phases)
    with load(store, **SETTINGS) as model:
        assert not str(model.fast_path).startswith("Decode takes the device pass")
        assert answers(model) == found


def answers(model: Model) -> list[str]:
    settings: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.8, "seed": 3}]
    texts = ["".join(piece.text for piece in model.chat().send("Hello", max_new_tokens=7, **each)) for each in settings]
    assert all(texts)
    return texts


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"why_off": "it is off"}, "it is off"),
        ({"why_off": ""}, "there is no libcuda.so.1"),
    ],
)
def test_why_there_is_none(settings: dict[str, str], reason: str, store: Path) -> None:
    opened = open_device_pass(Store.open(store), tiny_model("qwen3_moe"), torch.device("cuda"), **settings)
    (notice,) = opened.notices
    assert reason in notice
    assert opened.card is None
