"""`load`: checkpoint folder -> store -> model, against transformers on the same weights."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from support.pressure import wait_until_quiet
from support.tiny_models import FAMILIES, tiny_model, tiny_prompt
from transformers import AutoModelForCausalLM

from offload_moe import load
from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model
from offload_moe.errors import BudgetError, CheckpointError, ConfigError
from offload_moe.memory.nvidia import Nvidia
from offload_moe.store import Store
from tests.support.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny checkpoint per family, in bf16."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        tiny_model(family).to(torch.bfloat16).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))


def greedy(model: Model, batch: int) -> torch.Tensor:
    ids, mask = tiny_prompt(batch, 9)
    return model.hf.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, disable_compile=True
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_lossless_logits_are_those_of_from_pretrained(family: str, checkpoints: dict[str, Path]) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(
        checkpoints[family], dtype=torch.float32, experts_implementation="eager"
    )
    ids, mask = tiny_prompt(3, 9)
    with load(checkpoints[family], codec="bf16") as model, torch.inference_mode():
        expected = oracle(input_ids=ids, attention_mask=mask).logits
        assert expected.abs().max() > 0.1
        assert torch.equal(model.hf(input_ids=ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_are_the_same_for_every_number_of_slots_and_across_restarts(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    store = quantize(checkpoints[family], tmp_path / "store", codec="nf4")
    num_records = sum(layer.num_experts for layer in Store.open(store).layers)
    with load(store) as model:
        plan = model.placement.ram
        expected = [greedy(model, batch) for batch in (1, 3)]
    for num_slots, policy in ((1, "lru"), (2, "lfu"), (num_records // 2, "lru"), (num_records, "lfu")):
        with load(store, ram=plan.bytes_with(num_slots), policy=policy) as model:
            for batch, tokens in zip((1, 3), expected, strict=True):
                assert torch.equal(greedy(model, batch), tokens)
            assert model.engine.hierarchy.pools.num_ram_slots == num_slots


def test_a_checkpoint_is_converted_once(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []

    def report(phase: str, done: float = -1.0, total: float | None = None) -> None:
        phases.append(phase)

    load(checkpoints["mixtral"], progress=report).close()
    assert "Quantizing" in phases
    phases.clear()
    load(checkpoints["mixtral"], progress=report).close()
    assert "Quantizing" not in phases


@pytest.mark.parametrize("is_tied", [False, True])
def test_one_file_or_shards_tied_or_not_and_without_a_generation_config(is_tied: bool, tmp_path: Path) -> None:
    """The same model in every shape that checkpoints come in."""
    logits = []
    for name, shard_size in (("one", "1GB"), ("shards", "40KB")):
        folder = tmp_path / name
        write_checkpoint(folder, shard_size=shard_size, tie_word_embeddings=is_tied)
        (folder / "generation_config.json").unlink()
        oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        ids, mask = tiny_prompt(1, 9)
        ids %= oracle.config.vocab_size
        for dense_codec in (None, "int8"):
            with load(folder, codec="bf16", dense_codec=dense_codec) as model, torch.inference_mode():
                found = model.hf(input_ids=ids, attention_mask=mask).logits
                if dense_codec is None:
                    assert torch.equal(found, oracle(input_ids=ids, attention_mask=mask).logits)
                logits.append(found)
                assert model.hf.generation_config.eos_token_id == model.hf.config.eos_token_id
        assert (len(list(folder.glob("*.safetensors"))) == 1) == (name == "one")
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[3])
    assert not torch.equal(logits[0], logits[1])


def test_two_models_share_nothing(checkpoints: dict[str, Path]) -> None:
    with load(checkpoints["mixtral"]) as alone:
        expected = greedy(alone, 1)
    with (
        load(checkpoints["mixtral"]) as first,
        load(checkpoints["qwen3_moe"]) as second,
        load(checkpoints["mixtral"]) as third,
    ):
        greedy(second, 1)
        assert torch.equal(greedy(first, 1), expected)
        assert torch.equal(greedy(third, 1), expected)


def test_memory_is_told_while_experts_come_and_go(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm start brings experts while the user asks: going through them takes the lock."""
    with load(checkpoints["qwen3_moe"]) as model:
        greedy(model, 1)
        ram = model.engine.hierarchy.ram
        wait_until_quiet(ram)
        resident_keys = ram.residency.resident_keys
        with ram.changed:
            num_resident = len(resident_keys())

        def with_the_lock() -> list[int]:
            assert ram.changed._is_owned()
            return resident_keys()

        monkeypatch.setattr(ram.residency, "resident_keys", with_the_lock)
        assert model.memory["expert slots in RAM"] == num_resident * model.engine.hierarchy.pools.slot_bytes > 0


@pytest.mark.parametrize("dense_codec", ["nf4", "int8"])
def test_quantized_dense_weights_stay_close(dense_codec: str, checkpoints: dict[str, Path]) -> None:
    ids, mask = tiny_prompt(1, 9)
    with load(checkpoints["qwen3_moe"], codec="bf16") as model, torch.inference_mode():
        expected = model.hf(input_ids=ids, attention_mask=mask).logits
    with load(checkpoints["qwen3_moe"], codec="bf16", dense_codec=dense_codec) as model, torch.inference_mode():
        got = model.hf(input_ids=ids, attention_mask=mask).logits
        assert "QuantLinear" in repr(model.hf)
    assert 0 < (got - expected).norm() / expected.norm() < (0.5 if dense_codec == "nf4" else 0.1)


def test_a_budget_below_one_expert_is_refused_with_the_numbers(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(BudgetError, match=r"RAM lacks \d+ MiB .* It would fit with --ram"):
        load(checkpoints["mixtral"], ram="1MiB")


def test_what_would_write_a_model_without_its_experts_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with load(checkpoints["mixtral"]) as model:
        for write in (
            lambda: model.hf.save_pretrained(tmp_path / "saved"),
            lambda: model.hf.push_to_hub("org/model"),
            lambda: torch.save(model.hf, tmp_path / "saved.pt"),
            lambda: copy.deepcopy(model.hf),
            lambda: pickle.dumps(model),
        ):
            with pytest.raises(ConfigError, match=r"experts stay in the store.*model\.store\.path"):
                write()
        assert not (tmp_path / "saved").exists()
        assert greedy(model, 1).shape[1] > 9


def test_memory_that_is_named_and_not_there_is_said(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_moe.plan.fit.total_ram", lambda: 2 << 30)
    for settings, said in (
        ({"ram": "3GiB"}, r"--ram is 3\.0 GiB, and this machine has 2\.0 GiB"),
        ({"vram": "1GiB"}, r"--vram is 1\.0 GiB, and no GPU is used"),
    ):
        with pytest.warns(UserWarning, match=said):
            model = load(checkpoints["mixtral"], device="cpu", **settings)
        notice = model.notices[0]
        assert re.match(said, notice)
        model.close()


def test_a_card_that_is_not_used_is_said_at_load(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(
        "offload_moe.memory.unused_card.find_nvidia", lambda: Nvidia(driver="580.1", name="NVIDIA GeForce RTX 3060")
    )
    with pytest.warns(UserWarning, match=r"RTX 3060 is not used\. .*(Install|Update the driver)"):
        model = load(checkpoints["mixtral"])
    notice = model.notices[0]
    assert "RTX 3060 is not used" in notice
    model.close()
    with load(checkpoints["mixtral"], device="cpu") as chosen:
        assert chosen.notices == []


def test_experts_that_torch_computes_are_said_at_load(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, whatever the number of layers; not where the promise is eager's bits."""
    monkeypatch.setattr("offload_moe.experts.arithmetic.recognize_activation", lambda *_, **__: None)
    with pytest.warns(UserWarning, match=r"torch computes this model's experts on the CPU.*no kernel has"):
        model = load(checkpoints["mixtral"], device="cpu", codec="int8")
    notice = model.notices[0]
    assert notice.endswith("no kernel has their activation.")
    model.close()
    with load(checkpoints["mixtral"], device="cpu", codec="bf16") as lossless:
        assert lossless.notices == []


def test_a_source_that_is_nothing_is_named() -> None:
    with pytest.raises(CheckpointError, match="no/such/folder is neither"):
        load("no/such/folder")
