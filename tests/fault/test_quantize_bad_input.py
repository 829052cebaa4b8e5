"""Whatever is wrong with a source, it is one named error, and nothing is left that loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError, ConfigError, OffloadMoeError, UnsupportedModelError
from offload_moe.store import is_store
from tests.support.checkpoints import write_checkpoint

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_checkpoint(folder, shard_size="1GB")
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(source: Path | str, tmp_path: Path, error: type[OffloadMoeError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        quantize(source, tmp_path / "store", codec="bf16")
    assert "\n" not in str(caught.value)
    assert not is_store(tmp_path / "store")


def test_a_missing_expert_tensor(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.pop(EXPERT))
    refused(model, tmp_path, CheckpointError, rf"Tensor {EXPERT} is missing: expert 2 of 4")


def test_all_tensors_of_an_experts_parameter_missing(model: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(4):
            del tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]

    edit_tensors(model, change)
    refused(model, tmp_path, CheckpointError, r"brings model\.layers\.1\.mlp\.experts\.down_proj")


def test_a_missing_dense_tensor(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.pop("model.norm.weight"))
    refused(model, tmp_path, CheckpointError, r"no tensor brings model\.norm\.weight")


def test_one_expert_too_many(model: Path, tmp_path: Path) -> None:
    extra = EXPERT.replace("experts.2", "experts.4")
    edit_tensors(model, lambda tensors: tensors.update({extra: torch.zeros(24, 32, dtype=torch.bfloat16)}))
    refused(model, tmp_path, CheckpointError, rf"Tensor {extra} is one too many")


def test_an_unexpected_tensor(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.1.surprise": torch.zeros(3)}))
    refused(model, tmp_path, CheckpointError, r"model\.safetensors: tensor model\.layers\.1\.surprise has no place")


def test_a_layer_too_many(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=2)
    refused(model, tmp_path, CheckpointError, r"tensor model\.layers\.2\.\S+ has no place")


@pytest.mark.parametrize("name", [EXPERT, "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_tensor_of_another_shape(model: Path, tmp_path: Path, name: str) -> None:
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    refused(model, tmp_path, CheckpointError, name.replace(".", r"\."))


def test_every_expert_of_another_shape(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", moe_intermediate_size=20)
    refused(model, tmp_path, CheckpointError, r"tensor \S+ is \[24, 32\]; \S+gate_up_proj needs \[40, 32\]")


@pytest.mark.parametrize("name", [EXPERT, "model.norm.weight"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_tensor_of_another_dtype(model: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(model, tmp_path, CheckpointError, name.replace(".", r"\."))


def test_a_truncated_file(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    refused(model, tmp_path, CheckpointError, r"model\.safetensors is truncated inside tensor \S+: \d+ bytes, \d+")


def test_a_missing_shard(shards: Path, tmp_path: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(shards, tmp_path, CheckpointError, f"index.json names {shard.name}, which is not there")


def edit_index(folder: Path, name: str, file_name: object) -> None:
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"][name] = file_name
    index.write_text(json.dumps(document))


@pytest.mark.parametrize("path", ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors"])
def test_an_index_that_leads_out_of_the_folder(shards: Path, tmp_path: Path, path: str) -> None:
    shutil.copy(next(shards.glob("*.safetensors")), tmp_path / "outside.safetensors")
    edit_index(shards, "model.norm.weight", path)
    refused(shards, tmp_path, CheckpointError, r"leads out of the checkpoint folder; refused\. Put that file")


@pytest.mark.parametrize("weight_map", [[], {}, {"a": 1}, None])
def test_an_index_that_is_none(shards: Path, tmp_path: Path, weight_map: object) -> None:
    edit_json(shards / "model.safetensors.index.json", weight_map=weight_map)
    refused(shards, tmp_path, CheckpointError, r"is not a shard index: .*\. Download it again")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_nested_without_end(shards: Path, tmp_path: Path, name: str) -> None:
    (shards / name).write_text("[" * 100_000)
    refused(shards, tmp_path, CheckpointError, rf"{name} (cannot be read|is not a shard index): .*\. Download it again")


def test_a_pointer_of_git_lfs(shards: Path, tmp_path: Path) -> None:
    next(shards.glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")
    refused(shards, tmp_path, CheckpointError, r"not a safetensors file: .*`git lfs pull`")


def test_not_a_model_folder(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path, CheckpointError, r"is not a model folder: it has no config\.json")


@pytest.mark.parametrize("text", ["", "[]", '{"hidden_size": 3}', "{", '{"model_type": 3}'])
def test_a_config_that_is_none(model: Path, tmp_path: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    refused(model, tmp_path, CheckpointError, r"config\.json")


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "many"}, {"num_hidden_layers": -1}, {"num_experts": 0, "num_local_experts": 0}]
)
def test_a_config_with_nonsense_in_it(model: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    edit_json(model / "config.json", **changes)
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        quantize(model, tmp_path / "store", codec="bf16")


@pytest.mark.parametrize("source", ["nowhere/at/all", "./nowhere", "no spaces/please", "../up"])
def test_neither_a_folder_nor_a_hub_id(tmp_path: Path, source: str) -> None:
    refused(source, tmp_path, CheckpointError, "neither a folder nor a hub id")


def test_a_file_for_a_source(model: Path, tmp_path: Path) -> None:
    refused(model / "config.json", tmp_path, CheckpointError, "is a file, not a model folder")


def test_a_pickle_checkpoint(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, tmp_path, CheckpointError, r"only a pickle checkpoint \(pytorch_model\.bin\)")


def test_no_weights_at_all(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(model, tmp_path, CheckpointError, "has neither model.safetensors nor")


def test_a_config_that_asks_for_remote_code(model: Path, tmp_path: Path) -> None:
    edit_json(
        model / "config.json",
        model_type="mystery_moe",
        architectures=["MysteryModel"],
        auto_map={"AutoConfig": "mystery.Config"},
    )
    refused(model, tmp_path, UnsupportedModelError, "remote code .*trust_remote_code")


def test_remote_code_beside_a_known_model_type_is_never_run(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (model / "evil.py").write_text("raise SystemExit('run')")
    assert is_store(quantize(model, tmp_path / "store", codec="bf16"))


@pytest.mark.parametrize("architectures", [None, [], ["MysteryForCausalLM"], [5], "Qwen3MoeForCausalLM"])
def test_a_model_type_that_transformers_does_not_have(model: Path, tmp_path: Path, architectures: object) -> None:
    edit_json(model / "config.json", model_type="mystery_moe", architectures=architectures)
    refused(model, tmp_path, UnsupportedModelError, "'mystery_moe' is neither in this version of transformers nor")


@pytest.mark.parametrize("method", ["quark", "hqq"])
def test_a_quantized_checkpoint(model: Path, tmp_path: Path, method: str) -> None:
    edit_json(model / "config.json", quantization_config={"quant_method": method})
    refused(model, tmp_path, CheckpointError, rf"already quantized \({method}\), .* Use a version .*bf16")


def test_a_quantization_config_that_is_none(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", compression_config="fp8")
    refused(model, tmp_path, CheckpointError, "compression_config is 'fp8', expected an object")


def test_a_dense_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", tmp_path, UnsupportedModelError, "LlamaForCausalLM is a dense model")


def test_an_unknown_codec(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nf5"):
        quantize(model, tmp_path / "store", codec="nf5")


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(model: Path, tmp_path: Path, value: float, codec: str) -> None:
    edit_tensors(model, lambda tensors: tensors[EXPERT].view(-1)[5:6].fill_(value))
    with pytest.raises(CheckpointError, match=r"Expert 2 of model\.layers\.1\.mlp\.experts: gate_up_proj has NaN"):
        quantize(model, tmp_path / "store", codec=codec)
    assert not is_store(tmp_path / "store")


@pytest.mark.parametrize("dense_codec", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_dense_weights_that_are_no_numbers(model: Path, tmp_path: Path, name: str, dense_codec: str) -> None:
    edit_tensors(model, lambda tensors: tensors[name].view(-1)[-1:].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"{name}\W.*NaN"):
        quantize(model, tmp_path / "store", dense_codec=dense_codec)
    assert not is_store(tmp_path / "store")


@pytest.mark.parametrize("name", ["a\0b.safetensors", "x" * 5000])
def test_a_name_in_the_index_that_no_file_can_have(shards: Path, tmp_path: Path, name: str) -> None:
    edit_index(shards, EXPERT, name)
    refused(shards, tmp_path, CheckpointError, "is no file name|cannot be read")
