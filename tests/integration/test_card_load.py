"""`load` to text through the device pass, on the fake driver; and the line that says why there is none."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_moe_cli.status import full_statistics
from support.card_model import SessionLocks
from support.chat import chat_store
from support.cuda import fake, shim
from support.tiny_models import tiny_model

import offload_moe.engine.load as engine_load
from offload_moe import load
from offload_moe.card.device import CardDevice
from offload_moe.engine.device_pass import DevicePass, open_device_pass
from offload_moe.engine.model import Model
from offload_moe.memory.page_lock import PageLock
from offload_moe.memory.simulated import SimulatedCopier
from offload_moe.store import Store

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")
VRAM = 4 << 30
SETTINGS: dict[str, Any] = {"prefetch": 0, "context": 256, "dense_codec": "int8"}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[CardDevice]:
    """A machine whose `cuda` is the fake driver's; torch's memory on the CPU stands for the card's."""
    with fake.FakeDriver(adopts=1) as driver:
        device = CardDevice.open(driver.path, fake.nvrtc(), cubins=shim.CACHE / "cubins")
        measure = engine_load.measure_load

        def with_vram(*args: Any, **settings: Any) -> Any:
            machine = measure(*args, **settings)
            return replace(machine, vram_bytes=VRAM, chosen_dtype=torch.float32)

        monkeypatch.setattr(engine_load, "compute_device", lambda name: torch.device("cpu"))
        monkeypatch.setattr(engine_load, "measure_load", with_vram)
        monkeypatch.setattr(
            engine_load,
            "AcceleratorCopier",
            lambda _: SimulatedCopier(latency_s=0, page_lock=PageLock(SessionLocks(device))),
        )
        monkeypatch.setattr(engine_load, "open_device_pass", lambda *_, **__: DevicePass(card=device))
        yield device
        device.session.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("stores"))


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
