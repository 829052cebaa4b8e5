"""Text in, text out with encoder-decoders: each message is one text for the encoder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat import VOCABULARY_SIZE, byte_tokenizer
from support.checkpoints import write_checkpoint
from support.families import eager_model

from offload_moe import load
from offload_moe.chat.template import ENCODER_DECODER
from offload_moe.engine.model import Model
from tests.support.cli import load_cli

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "translate: a house"
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, "switch_transformers", vocab_size=VOCABULARY_SIZE, eos_token_id=256)
    byte_tokenizer(None).save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoint: Path) -> Iterator[Model]:
    with load(checkpoint, codec="bf16") as loaded:
        yield loaded


def expected_answer(checkpoint: Path, prompt: str) -> str:
    tokenizer = byte_tokenizer(None)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = eager_model(checkpoint).generate(ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, 1:], skip_special_tokens=True)


def test_generate_gives_the_text_of_transformers(checkpoint: Path, model: Model) -> None:
    expected = expected_answer(checkpoint, PROMPT)
    assert expected
    assert model.generate(PROMPT, raw=True, **SETTINGS) == expected
    assert model.stats.num_decode_tokens > 0


def test_each_message_of_a_conversation_stands_alone(checkpoint: Path, model: Model) -> None:
    session = model.chat(system="Answer in verse.")
    assert session.notice == ENCODER_DECODER
    first = "".join(piece.text for piece in session.send(PROMPT, **SETTINGS))
    again = "".join(piece.text for piece in session.send(PROMPT, **SETTINGS))
    assert first == again == expected_answer(checkpoint, PROMPT)


def test_run_prints_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(checkpoint), PROMPT, "--codec", "bf16", "--max-new-tokens", "8", "--temperature", "0"]
    assert load_cli().main(arguments) == 0
    assert capsys.readouterr().out.strip() == expected_answer(checkpoint, PROMPT).strip()
