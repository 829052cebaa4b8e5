"""The tokens at which a model in GGUF stops: of its metadata, and of control tokens by their text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_moe import load
from offload_moe.checkpoint.gguf_view import write_small_files
from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model
from tests.support.gguf_models import FIRST_SPECIAL, VOCABULARY, write_model

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
IDS = torch.tensor([[72, 101, 108, 108, 111]])
HELLO = [{"role": "user", "content": "Hello"}]
EOS, IM_END = FIRST_SPECIAL, FIRST_SPECIAL + 2
SMALL: dict[str, Any] = {"num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))


def stops_of(model: Model) -> list[int]:
    found = model.hf.generation_config.eos_token_id
    assert isinstance(found, list)
    return found


def answer(model: Model, prompt: Tensor = IDS) -> list[int]:
    with torch.no_grad():
        ids: list[int] = model.hf.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :].tolist()
    return ids


def vocabulary(path: Path, token: int, text: str, kind: int) -> dict[str, Any]:
    """Metadata of the same file with another text, and type, of a token."""
    content = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(content, key=content.__getitem__)
    kinds = [1] * FIRST_SPECIAL + [3] * (VOCABULARY - FIRST_SPECIAL)
    tokens[token], kinds[token] = text, kind
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}


def test_answers_stop_at_the_end_of_a_turn(tmp_path: Path) -> None:
    path = write_model(tmp_path / "plain", "qwen3_moe", **SMALL).path
    with load(path) as model:
        assert stops_of(model) == [EOS, IM_END]  # <|im_end|> by its text
        first = answer(model)[0]
        prompt = model.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_tensors="pt").input_ids
        spoken = answer(model, prompt)[0]
    metadata = {"tokenizer.ggml.eot_token_id": first, "tokenizer.ggml.eom_token_id": spoken}
    path = write_model(tmp_path / "turns", "qwen3_moe", metadata=metadata, **SMALL).path
    for source in (path, quantize(path, tmp_path / "store")):
        with load(source) as model:
            assert stops_of(model) == [*dict.fromkeys([EOS, first, spoken, IM_END])]
            assert answer(model) == [first]
            session = model.chat()
            assert [*session.send("Hello", temperature=0, max_new_tokens=3)] == []
            assert session.last_stats is not None
            assert session.last_stats.finish == "stop"


@pytest.mark.parametrize(("kind", "stops"), [(3, True), (1, False)])
def test_texts_count_of_control_tokens_alone(kind: int, stops: bool, tmp_path: Path) -> None:
    written = write_model(tmp_path, "qwen3_moe", **SMALL).path
    (tmp_path / "small").mkdir()
    write_small_files((written,), tmp_path / "small")
    metadata = vocabulary(tmp_path / "small", VOCABULARY - 1, "<|call|>", kind)
    path = write_model(tmp_path / "named", "qwen3_moe", metadata=metadata, **SMALL).path
    (tmp_path / "view").mkdir()
    write_small_files((path,), tmp_path / "view")
    found = json.loads((tmp_path / "view" / "generation_config.json").read_text())
    assert found == {"eos_token_id": [EOS, IM_END, VOCABULARY - 1] if stops else [EOS, IM_END]}
