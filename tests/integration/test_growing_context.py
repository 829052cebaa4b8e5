"""A loaded model whose conversation outgrows the planned context."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from offload_moe.convert.quantize import quantize
from offload_moe.decode.latent import absorb_latents
from offload_moe.engine.load import load
from offload_moe.engine.model import Model
from offload_moe.errors import BudgetError
from offload_moe.families.cache_name import with_cache
from offload_moe.plan import room
from offload_moe.plan.room import may_borrow
from tests.support.chat import byte_tokenizer, chat_model
from tests.support.plan import tiny_shape
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
        assert model.engine.hierarchy.num_slots("ram") == 18
    with load(store, context=16) as model:
        ram = model.placement.fast.bytes_with(18)
    with load(store, context=16, ram=ram) as model:
        assert torch.equal(model.hf.generate(**arguments), expected)
        assert 6 <= model.engine.hierarchy.num_slots("ram") < 18


@pytest.mark.parametrize("fast_path", [True, False])
def test_tokens_stay_the_same_while_slots_borrow_room_and_give_it_back(
    tmp_path: Path, fast_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts and two answers in one cache; 24 of 192 experts have a slot of their own."""
    monkeypatch.setattr(room, "NEVER_BORROWED_BYTES", 0)
    hf = tiny_model("mixtral", num_local_experts=64, max_position_embeddings=1024).to(torch.bfloat16)
    hf.save_pretrained(tmp_path / "model")
    store, context = quantize(tmp_path / "model", tmp_path / "store"), 640
    with load(store, context=context, fast_path=fast_path) as model:
        expected, ram = _two_answers(model), model.placement.fast.bytes_with(24)
    with load(store, context=context, ram=ram, fast_path=fast_path) as model:
        sizes: list[int] = []
        model.hf.get_decoder().register_forward_hook(lambda *_: sizes.append(model.engine.hierarchy.num_slots("ram")))
        assert torch.equal(_two_answers(model), expected)
        first, second = sizes[0], sizes[CHUNKS_AND_TOKENS]
        assert sizes[1] > first > 24  # with the prompt computed, its activations are free
        assert 24 <= second < sizes[CHUNKS_AND_TOKENS - 1]  # before the next one is computed, they are not
        assert 24 <= sizes[-1] < sizes[1]
        assert len({*sizes}) < len(sizes) / 8


CHUNKS_AND_TOKENS = 60  # forwards of the first answer: one chunk, and a token fewer than were written


def _two_answers(model: Model) -> torch.Tensor:
    """``[1, T]``: prompts of 9 and 400 tokens, answers of 60."""
    cache = DynamicCache(config=model.hf.config)
    ids = tiny_prompt(1, 9)[0]
    for more in (0, 400):
        ids = torch.cat([ids, tiny_prompt(1, more, seed=more)[0]], dim=1)
        ids = model.hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **with_cache(cache),
            max_new_tokens=CHUNKS_AND_TOKENS,
            do_sample=False,
            eos_token_id=None,
            disable_compile=True,
        )
    return ids


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere memory does not come back at once")
def test_room_is_lent_only_where_it_is_known_what_a_context_needs(store: Path) -> None:
    with load(store, context=64) as model:
        placement = model.placement
        assert model.room.borrows
    shapes = {family: (tiny_model(family), tiny_shape(family)) for family in ("mixtral", "gpt_oss", "deepseek_v3")}
    assert [may_borrow(hf, shape, placement) for hf, shape in shapes.values()] == [True, False, False]
    hf, shape = shapes["deepseek_v3"]
    absorb_latents(hf)
    assert may_borrow(hf, shape, placement)
    hf, shape = shapes["mixtral"]
    assert not may_borrow(hf, shape, replace(placement, vram=placement.ram))
    hf.set_attn_implementation("eager")
    assert not may_borrow(hf, shape, placement)


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
    with load(store, context=16) as model:
        ram = model.placement.fast.bytes_with(12)
    with load(store, context=16, ram=ram) as model:
        session = model.chat(raw=True)
        text = "".join(piece.text for piece in session.send("Once upon a time", max_new_tokens=400, temperature=0))
        stats = session.last_stats
        assert stats is not None
        assert stats.num_slots_given_up == 12 - model.engine.hierarchy.num_slots("ram") > 0
        assert text
