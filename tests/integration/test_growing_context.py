"""A loaded model whose conversation outgrows the planned context."""

from pathlib import Path

import pytest
import torch

from offload_moe.errors import BudgetError
from offload_moe.model import load
from offload_moe.quantize import quantize
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
