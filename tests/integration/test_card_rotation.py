"""The device pass of models that rotate keys by the length of the sequence, too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.card_model import CardModel, card_model
from support.cuda import fake, shim
from support.models import open_model
from support.tiny_models import tiny_model, tiny_prompt

from offload_moe.chat.recompute import recompute_of
from offload_moe.convert.quantize import quantize

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")]

WINDOW, NUM_PROMPT, NUM_NEW = 12, 9, 8
SWITCHING = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": WINDOW,
    "short_factor": [1.0] * 8,
    "long_factor": [8.0] * 8,
}
GROWING = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}


def store_with(folder: Path, **settings: Any) -> Path:
    tiny_model("qwen3_moe", **settings).to(torch.bfloat16).save_pretrained(folder / "model")
    return quantize(folder / "model", folder / "store", codec="nf4")


def tokens_one_by_one(hf: Any, num_tokens: int, num_prompt: int = NUM_PROMPT) -> torch.Tensor:
    """Logits ``[num_tokens, V]`` of a sequence that begins anew."""
    recompute_of(hf)
    ids, _ = tiny_prompt(1, num_prompt)
    out = hf.generate(
        ids,
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(out.logits)


def passed_positions(model: CardModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the positions of each pass."""
    passed: list[int] = []
    run = model.card.run

    def noted(ids: Any, positions: Any, *rest: Any) -> Any:
        passed.extend(positions)
        return run(ids, positions, *rest)

    monkeypatch.setattr(model.card, "run", noted)
    return passed


def test_factors_that_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across the window, and back below it with the next sequence."""
    store = store_with(tmp_path, rope_parameters=SWITCHING)
    with open_model(store) as cpu:
        expected = tokens_one_by_one(cpu.hf, NUM_NEW)
        shorter = tokens_one_by_one(cpu.hf, 2, 5)
    with fake.FakeDriver() as driver, card_model(store, driver, 24, 24, shim_mode="quick") as model:
        passed = passed_positions(model, monkeypatch)
        assert torch.equal(tokens_one_by_one(model.hf, NUM_NEW), expected)
        assert passed == list(range(NUM_PROMPT, NUM_PROMPT + NUM_NEW - 1))
        assert torch.equal(tokens_one_by_one(model.hf, 2, 5), shorter)


def test_angles_that_grow_with_the_sequence_take_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path, rope_parameters=GROWING, max_position_embeddings=WINDOW)
    with open_model(store) as cpu:
        expected = tokens_one_by_one(cpu.hf, NUM_NEW)
    with fake.FakeDriver() as driver, card_model(store, driver, 24, 24, shim_mode="quick") as model:
        passed = passed_positions(model, monkeypatch)
        found = tokens_one_by_one(model.hf, NUM_NEW)
        assert passed == list(range(NUM_PROMPT, WINDOW))
    num_passed = 1 + len(passed)
    assert torch.equal(found[:num_passed], expected[:num_passed])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
