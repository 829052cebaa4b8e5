"""A loaded model whose conversation outgrows the planned context."""

from pathlib import Path

import pytest
import torch

from offload_moe.errors import BudgetError
from offload_moe.model import load
from offload_moe.quantize import quantize
from tests.support.chat import byte_tokenizer, chat_model
from tests.support.tiny_models import tiny_model, tiny_prompt


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("growing")
    tiny_model("mixtral").to(torch.bfloat16).save_pretrained(root / "model")
    return quantize(root / "model", root / "store")


def test_tokens_stay_the_same_while_slots_give_way(store: Path) -> None:
    ids, mask = tiny_prompt(1, 9)
    arguments = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": 240,
        "do_sample": False,
        "eos_token_id": None,
        "disable_compile": True,
    }
    with load(store, context=512) as model:
        expected = model.hf.generate(**arguments)
        assert model._hierarchy.num_slots("ram") == 18
    with load(store, context=64) as model:
        ram = model.placement.fast.bytes_with(18)
    with load(store, context=64, ram=ram) as model:
        assert torch.equal(model.hf.generate(**arguments), expected)
        assert 6 <= model._hierarchy.num_slots("ram") < 18


def test_generation_beyond_all_room_is_refused_by_name(store: Path) -> None:
    with load(store, context=16) as model:
        fast = model.placement.fast
    with load(store, context=16, ram=fast.bytes_with(6)) as model, pytest.raises(BudgetError, match="Raise --ram"):
        ids, mask = tiny_prompt(1, 9)
        model.hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=300, eos_token_id=None)


def test_an_answer_says_how_many_slots_gave_way(tmp_path: Path) -> None:
    chat_model("mixtral", num_local_experts=6, num_experts_per_tok=2).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    store = quantize(tmp_path / "m", tmp_path / "store")
    with load(store, context=64) as model:
        ram = model.placement.fast.bytes_with(12)
    with load(store, context=64, ram=ram) as model:
        session = model.chat(raw=True)
        text = "".join(piece.text for piece in session.send("Once upon a time", max_new_tokens=400, temperature=0))
        stats = session.last_stats
        assert stats is not None
        assert stats.num_slots_given_up == 12 - model._hierarchy.num_slots("ram") > 0
        assert text
