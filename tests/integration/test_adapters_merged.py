"""`quantize --adapter`: a store of base weights and a LoRA adapter is that of the merged checkpoint."""

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offload_moe.checkpoint.adapter import Adapter
from offload_moe.convert.quantize import quantize
from offload_moe.convert.repair import Damage, find_damage, repair
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.store import Store
from tests.support.checkpoints import write_checkpoint
from tests.support.gguf_files import write_gguf

Q, EXPERT, DOWN = (
    "model.layers.1.self_attn.q_proj",
    "model.layers.0.mlp.experts.2.gate_proj",
    "model.layers.2.mlp.experts.3.down_proj",
)
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "base"
    write_checkpoint(folder, "qwen3_moe", shard_size="1GB")
    return folder


def matrices(base: Path, modules: tuple[str, ...] = (Q, EXPERT, DOWN), rank: int = 4) -> dict[str, Tensor]:
    """lora_A and lora_B of these modules, as PEFT names them."""
    stored = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    found = {}
    for module in modules:
        rows, columns = stored[f"{module}.weight"].shape
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / 4
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 4
    return found


def write_adapter(folder: Path, tensors: dict[str, Tensor], **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(base: Path, folder: Path, tensors: dict[str, Tensor], scales: dict[str, float]) -> Path:
    """The checkpoint with the changes in its weights."""
    shutil.copytree(base, folder)
    stored = load_file(base / "model.safetensors")
    for module, scale in scales.items():
        down, up = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        weight = stored[f"{module}.weight"]
        stored[f"{module}.weight"] = (weight.float() + scale * (up @ down)).to(weight.dtype)
        assert not torch.equal(stored[f"{module}.weight"], weight)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {Q: 2.0, EXPERT: 2.0, DOWN: 2.0}),
        ({"use_rslora": True}, {Q: 4.0, EXPERT: 4.0, DOWN: 4.0}),
        ({"alpha_pattern": {"q_proj": 1, "layers.2.mlp.experts.3.down_proj": 16}}, {Q: 0.25, EXPERT: 2.0, DOWN: 4.0}),
        ({"alpha_pattern": {"experts.*_proj": 2}, "lora_alpha": 4.0}, {Q: 1.0, EXPERT: 0.5, DOWN: 0.5}),
    ],
)
def test_the_store_is_that_of_the_merged_checkpoint(
    base: Path, tmp_path: Path, settings: dict[str, object], scales: dict[str, float]
) -> None:
    tensors = matrices(base)
    adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
    for codecs in ({"codec": "nf4", "dense_codec": "int8"}, {"codec": "bf16"}):
        name = codecs["codec"]
        store = quantize(base, tmp_path / name, adapter=adapter, **codecs)
        folder = tmp_path / "merged"
        if not folder.exists():
            merged(base, folder, tensors, scales)
        assert content(store) == content(quantize(folder, tmp_path / f"{name}-merged", **codecs))
    found = Store.open(tmp_path / "nf4").adapter
    assert found is not None
    assert (found.name, len(found.sha256)) == ("adapter", 64)
    assert Store.open(tmp_path / "nf4-merged").adapter is None


def test_an_adapter_beside_the_weights(base: Path, tmp_path: Path) -> None:
    tensors = matrices(base)
    write_adapter(Path(shutil.copytree(base, tmp_path / "both")), tensors)
    store = quantize(tmp_path / "both", tmp_path / "store", adapter=tmp_path / "both")
    folder = merged(base, tmp_path / "merged", tensors, {Q: 2.0, EXPERT: 2.0, DOWN: 2.0})
    assert content(store) == content(quantize(folder, tmp_path / "merged-store"))
    with pytest.raises(CheckpointError, match="--adapter FOLDER"):
        quantize(tmp_path / "both", tmp_path / "other")


def test_what_an_adapter_beside_the_weights_leaves_as_it_was_is_repaired(base: Path, tmp_path: Path) -> None:
    both = write_adapter(Path(shutil.copytree(base, tmp_path / "both")), matrices(base))
    store = Store.open(quantize(both, tmp_path / "store", codec="nf4", dense_codec="int8", adapter=both))
    before = {path.name: path.read_bytes() for path in store.path.iterdir()}

    def damaged(*names: str) -> list[Damage]:
        """Damage records of these names and a small file."""
        places = [(store.path / "config.json", 2, 1), *map(store.place_of, names)]
        for path, offset, _ in (place for place in places if place is not None):
            data = bytearray(path.read_bytes())
            data[offset + 64 * (path.suffix == ".safetensors")] ^= 4
            path.write_bytes(data)
        found = find_damage(store)
        assert len(found) == len(places)
        return found

    unchanged = ("layers.0.experts.1", "layers.2.experts.0", f"{Q.replace('q_proj', 'k_proj')}.weight")
    for source in (both, base):
        assert repair(store, damaged(*unchanged), source) == []
        assert {path.name: path.read_bytes() for path in store.path.iterdir()} == before
    remaining = repair(store, damaged("layers.0.experts.2", "layers.2.experts.3", f"{Q}.weight"), both)
    assert [damage.piece.name.partition(" (")[0] for damage in remaining] == [
        *(f"{Q}.weight", "expert 2 of layer 0", "expert 3 of layer 2"),
    ]


def test_another_adapter_does_not_resume(base: Path, tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    def stop(phase: str, done: float = -1.0, total: float | None = None) -> None:
        if done > 0:
            raise Stopped

    one = write_adapter(tmp_path / "one", matrices(base))
    with pytest.raises(Stopped):
        quantize(base, tmp_path / "store", adapter=one, progress=stop)
    two = write_adapter(tmp_path / "two", matrices(base), lora_alpha=16)
    with pytest.raises(Exception, match="begun with another adapter"):
        quantize(base, tmp_path / "store", adapter=two)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "only LoRA adapters are merged, not 'IA3'"),
        *(
            ({name: value}, f"an adapter with {name} is not merged here. Merge it with peft")
            for name, value in {
                "use_dora": True,
                "use_qalora": True,
                "use_bdlora": {"nblocks": 2},
                "fan_in_fan_out": True,
                "lora_bias": True,
                "modules_to_save": ["lm_head"],
                "layer_replication": [[0, 2]],
                "alora_invocation_tokens": [1, 2],
                "trainable_token_indices": [5],
                "megatron_config": {"hidden_size": 32},
                "kasa_config": {"beta": 0.1},
                "arrow_config": {"top_k": 2},
                "monteclora_config": {"num_samples": 4},
            }.items()
        ),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "an adapter with modules_to_save, bias"),
        *(
            ({"init_lora_weights": init}, f"an adapter with init_lora_weights {init!r} is not merged here. Merge it")
            for init in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "not yet invented")
        ),
        ({"lora_alpha": "eight"}, "lora_alpha of .* is 'eight'"),
        ({"lora_alpha": None}, "lora_alpha of .* is None"),
        ({"lora_alpha": 10**400}, "lora_alpha of .* is too large"),
        ({"alpha_pattern": {"q_proj": -(10**400)}, "use_rslora": True}, "lora_alpha of .*q_proj is too large"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "lora_alpha of .*q_proj is inf"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is .* no object"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern is 'q_proj', which is no object"),
        ({"alpha_pattern": {"(q_proj": 1}}, r"alpha_pattern '\(q_proj' cannot be compared: missing \)"),
        ({"alpha_pattern": {"*": 1}}, r"alpha_pattern '\*' cannot be compared"),
    ],
)
def test_other_adapters_are_refused_by_name(
    base: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", matrices(base), **settings)
    with pytest.raises(CheckpointError, match=message):
        quantize(base, tmp_path / "store", adapter=adapter)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_first_values_that_leave_the_base_weights_alone(base: Path, tmp_path: Path, init: object) -> None:
    plain = Adapter(write_adapter(tmp_path / "plain", matrices(base)))
    adapter = Adapter(write_adapter(tmp_path / "adapter", matrices(base), init_lora_weights=init))
    assert adapter.pairs.keys() == plain.pairs.keys()
    for name, pair in adapter.pairs.items():
        weight = torch.ones(pair.shape)
        assert torch.equal(pair.added(weight, 0), plain.pairs[name].added(weight, 0))
        assert not torch.equal(pair.added(weight, 0), weight)


def test_modules_of_other_ranks_are_scaled_by_theirs(base: Path, tmp_path: Path) -> None:
    tensors = matrices(base, (EXPERT,)) | matrices(base, (Q,), rank=8) | matrices(base, (DOWN,), rank=2)
    adapter = Adapter(write_adapter(tmp_path / "adapter", tensors, rank_pattern={"q_proj": 8, DOWN: 2}))
    for module, scale in ((Q, 1.0), (EXPERT, 2.0), (DOWN, 4.0)):
        down, up = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        change = adapter.pairs[f"{module}.weight"].added(torch.zeros(len(up), down.shape[1]), 0)
        torch.testing.assert_close(change, scale * (up @ down))
        assert change.any()


def test_matrices_stay_in_the_file_until_they_are_needed(base: Path, tmp_path: Path) -> None:
    tensors = matrices(base)
    folder = write_adapter(tmp_path / "adapter", tensors)
    before = [each for each in gc.get_objects() if type(each) is Tensor]
    adapter = Adapter(folder)
    assert len([each for each in gc.get_objects() if type(each) is Tensor]) == len(before)
    save_file({name: value * 2 for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    up, down = (tensors[f"base_model.model.{Q}.lora_{half}.weight"] for half in "BA")
    some = adapter.pairs[f"{Q}.weight"].added(torch.zeros(2, down.shape[1]), 3)
    torch.testing.assert_close(some, 8 * (up[3:5] @ down))
    os.truncate(folder / "adapter_model.safetensors", 500)
    with pytest.raises(CheckpointError, match=r"truncated inside tensor base_model\..*"):
        adapter.pairs[f"{Q}.weight"].added(torch.zeros(2, down.shape[1]), 3)


def test_an_expression_that_takes_too_long(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.checkpoint.adapter.PATTERN_SECONDS", 0.02)
    adapter = write_adapter(tmp_path / "adapter", matrices(base), alpha_pattern={r"(\w|\w\w|\.|\w\.)+[0-9]": 1})
    with pytest.raises(CheckpointError, match=r"alpha_pattern .* cannot be compared: .*timed out"):
        Adapter(adapter)


@pytest.mark.parametrize(("rank", "dtype"), [(0, torch.float32), (4, torch.float8_e4m3fn), (4, torch.int8)])
def test_matrices_of_no_rank_or_of_no_usual_numbers(base: Path, tmp_path: Path, rank: int, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in matrices(base, rank=rank).items()}
    message = "has lora_A of rank 0" if rank == 0 else f"lora_[AB].weight is {dtype}. Save the adapter in bfloat16"
    with pytest.raises(CheckpointError, match=message):
        Adapter(write_adapter(tmp_path / "adapter", tensors))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("base_model.model.lm_head.lora_embedding_A", (4, 64), "lora_embedding_A is not merged here"),
        (f"base_model.model.{Q}.lora_magnitude_vector", (32,), "lora_magnitude_vector is not merged here"),
        ("base_model.model.model.norm.weight", (32,), r"norm\.weight is not merged here"),
        ("base_model.model.model.layers.0.mlp.gate.lora_A.weight", (4, 32), r"gate\.lora_A\.weight is not merged here"),
    ],
)
def test_tensors_that_are_no_pair_are_refused_by_name(
    base: Path, tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", matrices(base) | {name: torch.ones(shape)})
    with pytest.raises(CheckpointError, match=message):
        quantize(base, tmp_path / "store", adapter=adapter)


def test_weights_that_the_checkpoint_does_not_have(base: Path, tmp_path: Path) -> None:
    fused = {
        "base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.ones(16, 32),
        "base_model.model.model.layers.0.mlp.experts.lora_B.weight": torch.ones(48, 16),
    }
    adapter = write_adapter(tmp_path / "fused", fused)
    with pytest.raises(CheckpointError, match=r"changes model\.layers\.0\.mlp\.experts\.weight \(1 such weights\)"):
        quantize(base, tmp_path / "store", adapter=adapter)
    tensors = {name: value[:, :16] if "lora_A" in name else value for name, value in matrices(base).items()}
    adapter = write_adapter(tmp_path / "narrow", {name: value.contiguous() for name, value in tensors.items()})
    with pytest.raises(
        CheckpointError, match=r"of another model: .*gate_proj\.weight is \[24, 32\], its change \[24, 16\]"
    ):
        quantize(base, tmp_path / "store", adapter=adapter)


def test_folders_that_hold_no_adapter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no PEFT adapter: it has no adapter_config\.json"):
        quantize(base, tmp_path / "store", adapter=base)
    adapter = write_adapter(tmp_path / "pickled", matrices(base))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"Pickled adapters \(\.bin\) are never read"):
        quantize(base, tmp_path / "store", adapter=adapter)


def test_a_gguf_file_keeps_its_bits(base: Path, tmp_path: Path) -> None:
    quantized, _ = write_gguf(tmp_path, "qwen3_moe")
    adapter = write_adapter(tmp_path / "adapter", matrices(base))
    with pytest.raises(ConfigError, match="Choose a --codec to merge an adapter"):
        quantize(next(quantized.glob("*.gguf")), tmp_path / "store", adapter=adapter)
