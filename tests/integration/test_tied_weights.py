"""Weights that a config ties, against transformers: tied where they are equal or one is missing, else kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload_moe.errors import CheckpointError
from offload_moe.plan import Machine, make_plan
from offload_moe.store import Store
from tests.support.checkpoints import write_checkpoint
from tests.support.plan import GIB
from tests.support.reference import (
    converted,
    edit_config,
    expected_logits,
    read_tensors,
    stored_logits,
    write_single,
)

pytestmark = pytest.mark.filterwarnings("ignore")
HEAD = "lm_head.weight"
EMBEDDINGS = {
    "mixtral": "model.embed_tokens.weight",
    "qwen3_vl_moe": "model.language_model.embed_tokens.weight",
    "switch_transformers": "shared.weight",
}


def tied_folder(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """A checkpoint with a head of its own whose config says that it has none; returns its tensors."""
    write_checkpoint(folder, family, shard_size="1GB", tie_word_embeddings=False, num_hidden_layers=2)
    edit_config(folder, tie_word_embeddings=True)
    return read_tensors(folder)


def close(folder: Path, store: Path) -> None:
    expected, got = expected_logits(folder), stored_logits(store)
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_a_head_that_differs_is_kept(family: str, tmp_path: Path) -> None:
    tied_folder(tmp_path / "model", family)
    notices = converted(tmp_path / "model", tmp_path / "store")
    assert any(f"ties {HEAD} to {EMBEDDINGS[family]}, but" in notice for notice in notices)
    assert HEAD in Store.open(tmp_path / "store").dense
    close(tmp_path / "model", tmp_path / "store")


def test_a_head_that_differs_in_its_last_row_is_kept(tmp_path: Path) -> None:
    tensors = tied_folder(tmp_path / "model", "mixtral")
    tensors[HEAD] = tensors[EMBEDDINGS["mixtral"]].clone()
    tensors[HEAD][-1, -1] += 1
    write_single(tmp_path / "model", tensors)
    converted(tmp_path / "model", tmp_path / "store")
    close(tmp_path / "model", tmp_path / "store")


def test_an_equal_head_is_stored_once(tmp_path: Path) -> None:
    tensors = tied_folder(tmp_path / "model", "mixtral")
    tensors[HEAD] = tensors[EMBEDDINGS["mixtral"]].clone()
    write_single(tmp_path / "model", tensors)
    assert not [notice for notice in converted(tmp_path / "model", tmp_path / "store") if "ties" in notice]
    assert HEAD not in Store.open(tmp_path / "store").dense
    close(tmp_path / "model", tmp_path / "store")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_vl_moe"])
def test_a_head_alone_is_the_embedding_too(family: str, tmp_path: Path) -> None:
    tensors = tied_folder(tmp_path / "model", family)
    del tensors[EMBEDDINGS[family]]
    write_single(tmp_path / "model", tensors)
    converted(tmp_path / "model", tmp_path / "store")
    assert EMBEDDINGS[family] in Store.open(tmp_path / "store").dense
    close(tmp_path / "model", tmp_path / "store")


def test_a_head_that_is_missing_and_not_tied_is_named(tmp_path: Path) -> None:
    tensors = tied_folder(tmp_path / "model", "mixtral")
    del tensors[HEAD]
    write_single(tmp_path / "model", tensors)
    edit_config(tmp_path / "model", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=rf'brings {HEAD}.*"tie_word_embeddings": true'):
        converted(tmp_path / "model", tmp_path / "store")


def test_a_head_of_its_own_is_quantized_like_any_other(tmp_path: Path) -> None:
    """Not a quantized copy of the embedding, as a tied one would get."""
    from offload_moe import load

    tied_folder(tmp_path / "model", "mixtral")
    converted(tmp_path / "model", tmp_path / "store")
    expected = expected_logits(tmp_path / "model")
    with load(tmp_path / "store", dtype=torch.float32, dense_codec="int8", context=64) as model, torch.no_grad():
        got = model.hf(input_ids=torch.tensor([[3, 17, 5, 60, 41, 22]])).logits
    assert 0 < (got - expected).norm() / expected.norm() < 0.05


def test_a_plan_knows_the_head(tmp_path: Path) -> None:
    tied_folder(tmp_path / "model", "mixtral")
    converted(tmp_path / "model", tmp_path / "store")
    machine = Machine(ram_bytes=GIB)
    shape = make_plan(tmp_path / "model", machine).shape
    assert shape.tied_head is None
    assert HEAD in {weight.name for weight in shape.dense}
    stored = make_plan(tmp_path / "store", machine).shape  # lossless: its attention takes no rows
    assert replace(stored, attention=shape.attention) == shape
    edit_config(tmp_path / "model", tie_word_embeddings=False)
    assert make_plan(tmp_path / "model", machine).shape == shape
