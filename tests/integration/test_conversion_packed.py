"""Checkpoints of packed integers become the stores of the models that they stand for, or are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.unused import with_a_meaning
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError
from tests.support.packed import Parts, write_packed_checkpoint
from tests.support.quantized import WEIGHTS, edit_json, edit_tensors
from tests.support.stores import assert_same_stores

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
METHODS = ("compressed-tensors", "gptq", "gptq_v2", "awq")
PREFIX = "model.layers.1.mlp.experts.2.up_proj."


@pytest.mark.parametrize("method", METHODS)
def test_a_store_has_the_bytes_of_the_model_it_stands_for(method: str, tmp_path: Path) -> None:
    packed, plain = write_packed_checkpoint(tmp_path, method)
    for codec in ("nf4", "bf16"):
        a, b = (quantize(source, tmp_path / f"{source.name}-{codec}", codec=codec) for source in (packed, plain))
        assert_same_stores(a, b)


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "gptq_v2"])
def test_eight_bits(method: str, tmp_path: Path) -> None:
    packed, plain = write_packed_checkpoint(tmp_path, method, bits=8)
    assert_same_stores(quantize(packed, tmp_path / "a"), quantize(plain, tmp_path / "b"))


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_those_of_the_whole(method: str, tmp_path: Path) -> None:
    with Checkpoint(write_packed_checkpoint(tmp_path, method)[0]) as checkpoint:
        name = "model.layers.0.self_attn.q_proj.weight"
        whole = checkpoint.dense_tensor(name)
        assert torch.equal(checkpoint.tensors.read_rows(name, 3, 11), whole[3:11])
        assert torch.equal(torch.cat([*checkpoint.dense_chunks(name, 500)]), whole.reshape(-1).view(torch.uint8))


def refused(source: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        quantize(source, tmp_path / "store")


@pytest.mark.parametrize(
    ("method", "part", "value", "match"),
    [
        ("compressed-tensors", "weight_scale", None, "weight_scale is missing"),
        ("compressed-tensors", "weight_scale", torch.ones(24, 3), "do not fit together"),
        ("compressed-tensors", "weight_scale", torch.ones(24, 0), "do not fit together"),
        ("compressed-tensors", "weight_scale", torch.ones(24), "belongs to no compressed-tensors matrix"),
        ("compressed-tensors", "weight_shape", torch.tensor([24, 31]), r"weight_shape is not \[24, 32\]"),
        ("compressed-tensors", "weight_packed", torch.zeros(24, 4), "do not fit together"),
        ("compressed-tensors", "weight_g_idx", torch.full((32,), 4).int(), "names groups that are not there"),
        ("compressed-tensors", "weight_g_idx", torch.zeros(31).int(), "do not fit together"),
        ("compressed-tensors", "weight_zero_point", torch.zeros(24, 4).int(), "do not fit together"),
        ("gptq", "g_idx", None, "g_idx is missing"),
        ("gptq", "g_idx", torch.full((32,), 4).int(), "names GPTQ groups that are not there"),
        ("gptq", "g_idx", torch.full((32,), -1).int(), "names GPTQ groups that are not there"),
        ("gptq", "g_idx", torch.zeros(32), "do not fit together"),
        ("gptq", "qzeros", torch.zeros(4, 2).int(), "do not fit together"),
        ("awq", "scales", torch.ones(5, 24), "do not fit together"),
        ("awq", "scales", torch.full((4, 24), torch.nan), "NaN or infinite weights"),
        ("gptq", "scales", torch.full((4, 24), torch.inf), "NaN or infinite weights"),
        ("compressed-tensors", "weight_scale", torch.full((24, 4), torch.nan), "NaN or infinite weights"),
    ],
)
def test_damaged_parts(tmp_path: Path, method: str, part: str, value: torch.Tensor | None, match: str) -> None:
    packed, _ = write_packed_checkpoint(tmp_path, method)
    edit_tensors(packed, lambda t: {k: v for k, v in (t | {PREFIX + part: value}).items() if v is not None})
    refused(packed, tmp_path, match)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            r"\(nvfp4-pack-quantized\), of which .* can be read. Use a version",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            r"\(sparse-24-bitmask\), of which .* Use a version",
        ),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "in the marlin layout; gptq and gptq_v2 .* Use"),
        ({"quant_method": "gptq", "checkpoint_format": ["x"]}, r"in the \['x'\] layout; gptq and gptq_v2 .* Use"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "in the marlin layout; gptq and gptq_v2 .* Use"),
        ({"quant_method": "gptq", "format": "gptq_p", "bits": 3}, "in the gptq_p layout; gptq and gptq_v2 .* Use"),
        ({"quant_method": "auto-round", "packing_format": "mlx"}, "AutoRound in the mlx layout, .* Use a version"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in the gemv layout.* Use a version"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            r"with ModelOpt \(NVFP4\), of which FP8 can be read. Use a version",
        ),
        *(
            ({"quant_method": method}, rf"already quantized \({method}\), .* Use a version of the model in bf16")
            for method in ("hqq", "aqlm", "vptq", "eetq", "quanto", "torchao", "spqr", "bitnet", "quark", "exl3")
        ),
        ({"bits": 4, "group_size": 8}, r"already quantized \(in a way without a name\), .* Use a version"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, settings: dict[str, object], match: str) -> None:
    packed, _ = write_packed_checkpoint(tmp_path, "gptq")
    edit_json(packed / "config.json", quantization_config=settings)
    refused(packed, tmp_path, match)


@pytest.mark.parametrize("is_there_twice", [True, False])
def test_mlx_is_named(tmp_path: Path, is_there_twice: bool) -> None:
    """It writes the same settings once or twice, neither of them with a name."""
    packed, _ = write_packed_checkpoint(tmp_path, "gptq")
    settings = {"bits": 4, "group_size": 8}
    edit_json(packed / "config.json", quantization=settings, quantization_config=settings if is_there_twice else None)
    refused(packed, tmp_path, r"already quantized \(MLX\), .* Use a version")


@pytest.mark.parametrize("bits", [3, 0])
def test_bits_of_compressed_tensors(tmp_path: Path, bits: int) -> None:
    packed, _ = write_packed_checkpoint(tmp_path, "compressed-tensors")
    groups = {"a": {"targets": ["Linear"], "weights": {"num_bits": bits}}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    edit_json(packed / "config.json", quantization_config=settings)
    refused(
        packed, tmp_path, f"weight_packed is compressed-tensors with {bits} bits; 4 and 8 can be read. Use a version"
    )


def zero_biases(tensors: Parts) -> Parts:
    """As AutoGPTQ writes them: beside every quantized projection."""
    found = {name: value for name, value in tensors.items() if name.endswith("qweight")}
    return tensors | {
        name.replace("qweight", "bias"): torch.zeros(value.shape[1], dtype=torch.float16)
        for name, value in found.items()
    }


@pytest.mark.parametrize("method", ["gptq", "gptq_v2"])
def test_biases_of_zeros_mean_nothing(method: str, tmp_path: Path) -> None:
    packed, plain = write_packed_checkpoint(tmp_path, method)
    edit_tensors(packed, zero_biases)
    assert_same_stores(quantize(packed, tmp_path / "a"), quantize(plain, tmp_path / "b"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{PREFIX}bias", 1e-7),
        (f"{PREFIX}bias", torch.nan),
        ("model.layers.0.self_attn.o_proj.bias", -1.0),
        (f"{PREFIX}lora_A", 0.0),
    ],
)
def test_a_bias_that_is_not_zero_is_foreign(tmp_path: Path, name: str, value: float) -> None:
    packed, _ = write_packed_checkpoint(tmp_path, "gptq")

    def add(tensors: Parts) -> Parts:
        foreign = torch.zeros(24)
        foreign[5] = value
        return zero_biases(tensors) | {name: foreign}

    edit_tensors(packed, add)
    refused(packed, tmp_path, f"tensor {name} has no place in Qwen3MoeForCausalLM .1 such")


def test_biases_that_cannot_be_looked_at(tmp_path: Path) -> None:
    """Shard by shard, nothing is read before its turn."""
    packed, _ = write_packed_checkpoint(tmp_path, "gptq")
    edit_tensors(packed, zero_biases)
    with Checkpoint(packed) as checkpoint:
        found = [name for name in checkpoint.tensors.entries if name.startswith(PREFIX) and name.endswith("bias")]
        with pytest.raises(CheckpointError, match=r"Convert it without --delete-source-shards"):
            with_a_meaning(checkpoint.tensors, found, may_read=False)
        assert with_a_meaning(checkpoint.tensors, found, may_read=True) == ()


@pytest.mark.parametrize("dynamic", [{"+:.*down_proj.*": {"bits": 8}}, {r"-:.*experts\.2\..*": {}}])
def test_layers_of_other_bits_and_layers_left_out(tmp_path: Path, dynamic: dict[str, object]) -> None:
    """GPTQModel's `dynamic`: what it says is in the tensors, so that rules need not be matched."""
    eight, eight_plain = write_packed_checkpoint(tmp_path / "8", "gptq", bits=8)
    four, four_plain = write_packed_checkpoint(tmp_path / "4", "gptq")
    left_out = next(iter(dynamic)).startswith("-")
    others, part = load_file((eight_plain if left_out else eight) / WEIGHTS), "experts.2." if left_out else "down_proj"

    def exchanged(tensors: Parts) -> Parts:
        kept = {name: value for name, value in tensors.items() if part not in name}
        return kept | {name: value for name, value in others.items() if part in name}

    edit_tensors(four, exchanged)
    plain = load_file(eight_plain / WEIGHTS)
    edit_tensors(four_plain, lambda tensors: tensors | {name: plain[name] for name in tensors if part in name})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 8, "dynamic": dynamic}
    edit_json(four / "config.json", quantization_config=settings)
    assert_same_stores(quantize(four, tmp_path / "a", codec="bf16"), quantize(four_plain, tmp_path / "b", codec="bf16"))


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_beside_the_config(tmp_path: Path, name: str) -> None:
    packed, plain = write_packed_checkpoint(tmp_path, "gptq" if name == "quantize_config.json" else "awq")
    config = json.loads((packed / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (packed / name).write_text(json.dumps(settings))
    (packed / "config.json").write_text(json.dumps(config))
    with Checkpoint(packed) as found, Checkpoint(plain) as expected:
        for part, value in expected.expert(1, 2).items():
            assert value.abs().sum() > 0
            assert torch.equal(found.expert(1, 2)[part], value)
