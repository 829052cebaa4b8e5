"""GGUF files as they lie by the device pass, on the fake driver: the CPU's bits, or the reason why there is none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_machine import card_machine
from support.card_model import card_model, check_tables, logits
from support.cuda import fake, shim
from support.gguf_models import MIXED, write_model
from support.models import open_model

from offload_moe import load
from offload_moe.convert.sources import ensure_view
from offload_moe.errors import DevicePassUnavailable

pytestmark = [
    pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # upstream's, of models outside their usual sizes
]

Q4_K_M = MIXED | {"token_embd": "Q4_K"}
Q8_0 = {"ffn_down_exps": "MXFP4"}
NUM_SLOTS, ON_CARD = 8, 3  # of two layers of four experts, of which a token takes two


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def driver() -> Iterator[fake.FakeDriver]:
    with fake.FakeDriver() as driver:
        yield driver


def view_of(path: Path) -> Path:
    return ensure_view(path, str(path))


@pytest.mark.parametrize(
    ("family", "kind", "kinds", "mode"),
    [
        ("qwen3_moe", "Q4_K", Q4_K_M, "queued"),
        pytest.param("qwen3_moe", "Q4_K", Q4_K_M, "stepwise", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "Q8_0", Q8_0, "queued", marks=pytest.mark.slow),  # a shared expert
        pytest.param("gpt_oss", "Q6_K", Q8_0, "queued", marks=pytest.mark.slow),  # biases
    ],
)
def test_the_bits_are_the_cpus(
    family: str, kind: str, kinds: dict[str, str], mode: Any, tmp_path: Path, driver: fake.FakeDriver
) -> None:
    """A file of mixed types, with few experts on the card."""
    store = view_of(write_model(tmp_path, family, kind, kinds).path)
    with open_model(store) as model:
        expected = logits(model.hf)
    with card_model(store, driver, NUM_SLOTS, ON_CARD, dense_codec=None, shim_mode="quick") as model:
        model.card.mode.mode = mode
        assert model.card.parts.head is not None
        assert torch.equal(logits(model.hf), expected)
        check_tables(model)


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ({"ffn_gate_exps": "Q5_K", "ffn_up_exps": "Q5_K"}, "experts in gguf:Q5_K,Q5_K,Q4_K"),
        ({"ffn_gate_exps": "Q6_K"}, "experts in gguf:Q6_K,Q4_K,Q4_K, whose gate and up rows have different types"),
        ({"ffn_down_exps": "BF16"}, "experts in gguf:Q4_K,Q4_K,BF16"),
        ({"ffn_down_exps": "F16"}, "experts in gguf:Q4_K,Q4_K,F16"),
        ({"token_embd": "Q5_K"}, "an embedding in GGUF's type Q5_K"),
        ({"attn_q": "Q5_0"}, "dense weights in GGUF's type Q5_0"),
    ],
)
def test_what_has_no_kernel_is_named(
    kinds: dict[str, str], reason: str, tmp_path: Path, driver: fake.FakeDriver
) -> None:
    store = view_of(write_model(tmp_path, "qwen3_moe", "Q4_K", kinds).path)
    with (
        pytest.raises(DevicePassUnavailable, match=reason),
        card_model(store, driver, NUM_SLOTS, ON_CARD, dense_codec=None, shim_mode="quick") as model,
    ):
        logits(model.hf)


def test_a_file_on_a_named_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `load`: the answer of the CPU, token for token."""
    path = write_model(tmp_path, "qwen3_moe", "Q4_K", Q4_K_M, tie_word_embeddings=True).path
    settings: dict[str, Any] = {"prefetch": 0, "context": 256}
    with card_machine(monkeypatch), load(path, device="cuda", **settings) as model:
        assert str(model.fast_path).startswith("Decode takes the device pass through all")
        found = logits(model.hf)
        assert model.stats.num_acquires > 0
    monkeypatch.undo()
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    with load(path, **settings) as model:
        assert torch.equal(logits(model.hf), found)
