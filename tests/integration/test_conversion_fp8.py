"""FP8 checkpoints become the stores that the bf16 models they stand for become."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from offload_moe import load
from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.fp8 import fp8_values
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError
from offload_moe.store import Store, is_store
from tests.support.quantized import edit_json, edit_tensors, write_fp8_checkpoint
from tests.support.stores import assert_same_stores

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
UNEVEN = {"hidden_size": 136, "moe_intermediate_size": 136, "intermediate_size": 200}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_fp8_checkpoint(tmp_path_factory.mktemp("even"))


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("dense_codec", ["bf16", "int8"])
def test_a_store_has_the_bytes_of_the_dequantized_model(
    pair: tuple[Path, Path], tmp_path: Path, codec: str, dense_codec: str
) -> None:
    for source, name in zip(pair, ("fp8", "bf16"), strict=True):
        quantize(source, tmp_path / name, codec=codec, dense_codec=dense_codec)
    assert_same_stores(tmp_path / "fp8", tmp_path / "bf16")


@pytest.mark.parametrize("block", [(128, 128), (20, 12), (7, 200)])
def test_blocks_that_do_not_fit_the_matrix(block: tuple[int, int], tmp_path: Path) -> None:
    fp8, plain = write_fp8_checkpoint(tmp_path, block, **UNEVEN)
    assert_same_stores(quantize(fp8, tmp_path / "a", codec="nf4"), quantize(plain, tmp_path / "b", codec="nf4"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_fp8_number_is_exact(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    for some in (codes, codes[:100], codes[200:255]):  # with NaN and without
        values = fp8_values(some)
        torch.testing.assert_close(values, some.float(), rtol=0, atol=0, equal_nan=True)
        is_number = ~values.isnan()
        assert torch.equal(values.signbit()[is_number], some.float().signbit()[is_number])


def test_chunks_of_a_dense_tensor_cut_through_blocks(pair: tuple[Path, Path]) -> None:
    with Checkpoint(pair[0]) as checkpoint:
        for name in checkpoint.dense:
            whole = checkpoint.dense_tensor(name).reshape(-1).view(torch.uint8)
            assert torch.equal(torch.cat([*checkpoint.dense_chunks(name, 300)]), whole)


def test_a_loaded_fp8_model_computes_what_the_bf16_model_does(pair: tuple[Path, Path], tmp_path: Path) -> None:
    store = quantize(pair[0], tmp_path / "store", codec="bf16")
    reference = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    ids = torch.arange(1, 13)[None]
    with load(store, dtype=torch.float32, exact=True) as model, torch.no_grad():
        logits = model.hf(ids).logits
        assert logits.abs().sum() > 0
        torch.testing.assert_close(logits, reference(ids).logits, rtol=1e-5, atol=1e-5)
        assert not hasattr(model.hf.config, "quantization_config")


def test_layers_for_multi_token_prediction_are_skipped_with_a_word(pair: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []

    def report(phase: str, done: float = -1.0, total: float | None = None) -> None:
        said.append(phase)

    quantize(pair[0], tmp_path / "store", codec="bf16", progress=report)
    assert "tensors of multi-token prediction" in said[0]
    assert "model.layers.3." in said[0]
    assert not any("layers.3." in name for name in Store.open(tmp_path / "store").dense)


def test_kimi_is_read_as_the_architecture_it_names(tmp_path: Path) -> None:
    fp8, plain = write_fp8_checkpoint(tmp_path)
    edit_json(fp8 / "config.json", model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.Config"})
    assert_same_stores(quantize(fp8, tmp_path / "a"), quantize(plain, tmp_path / "b"))
    with load(tmp_path / "a") as model:
        assert type(model.hf).__name__ == "DeepseekV3ForCausalLM"


def test_one_scale_for_a_whole_weight(tmp_path: Path) -> None:
    fp8, plain = write_fp8_checkpoint(tmp_path, (1000, 1000))
    edit_json(fp8 / "config.json", quantization_config={"quant_method": "fp8", "activation_scheme": "static"})

    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].reshape(())
            tensors[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(1.0)

    edit_tensors(fp8, flatten)
    assert_same_stores(quantize(fp8, tmp_path / "a"), quantize(plain, tmp_path / "b"))


SCALES = (
    ("k_scale", "v_scale", "q_scale", "prob_scale"),
    ("kv_scale", "kv_cache_scaling_factor"),
    ("k_proj.k_scale", "v_proj.v_scale", "attn.k_scale", "k_zero_point"),
    ("k_proj.output_scale", "prob_output_scale", "q_proj.input_scale", "q_proj.input_zero_point"),
    ("o_proj.input_scale_ub", "o_proj.activation_scale", "qkv_proj_input_scale"),
)


@pytest.mark.parametrize("names", SCALES)
def test_scales_of_activations_and_caches_are_left_out(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Engines that round activations, keys and values use them; the weights stand for the same numbers without."""
    fp8, plain = write_fp8_checkpoint(tmp_path)
    scales = {f"model.layers.1.self_attn.{name}": torch.tensor(0.02) for name in names}
    edit_tensors(fp8, lambda tensors: tensors | scales)
    assert_same_stores(quantize(fp8, tmp_path / "a"), quantize(plain, tmp_path / "b"))


def test_scales_of_the_cache_of_a_model_in_bf16(tmp_path: Path) -> None:
    _, plain = write_fp8_checkpoint(tmp_path)
    expected = quantize(plain, tmp_path / "a")
    edit_tensors(plain, lambda tensors: tensors | {"model.layers.1.self_attn.k_scale": torch.tensor(0.02)})
    assert_same_stores(quantize(plain, tmp_path / "b"), expected)


@pytest.mark.parametrize(
    "name", ["weight_scale", "x_scale", "layer_output_scale", "k_scaled", "scale", "my.k_scale.weight"]
)
def test_other_foreign_scales_are_refused(tmp_path: Path, name: str) -> None:
    fp8, _ = write_fp8_checkpoint(tmp_path)
    edit_tensors(fp8, lambda tensors: tensors | {f"model.layers.1.self_attn.{name}": torch.tensor(0.02)})
    refused(fp8, tmp_path, f"tensor model.layers.1.self_attn.{name} has no place in")


@pytest.mark.parametrize("shape", [(), (1,), (-1, 1)])
def test_scales_as_vllm_writes_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """One per weight or per row, ``weight_scale``, with a scale of its inputs."""
    fp8, plain = write_fp8_checkpoint(tmp_path, (1, 1000) if shape == (-1, 1) else (1000, 1000))
    edit_json(fp8 / "config.json", quantization_config={"quant_method": "fp8", "activation_scheme": "static"})

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name.removesuffix("_inv")] = tensors.pop(name).reshape(shape)
            tensors[name.replace("weight_scale_inv", "input_scale")] = torch.tensor(0.01)

    edit_tensors(fp8, rename)
    assert_same_stores(quantize(fp8, tmp_path / "a"), quantize(plain, tmp_path / "b"))


def refused(fp8: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        quantize(fp8, tmp_path / "store")
    assert not is_store(tmp_path / "store")


@pytest.mark.parametrize("dims", [(1, 2), (3, 2), (4,), ()])
def test_scales_of_another_shape(tmp_path: Path, dims: tuple[int, ...]) -> None:
    fp8, _ = write_fp8_checkpoint(tmp_path)
    edit_tensors(fp8, lambda tensors: tensors | {f"{EXPERT}_scale_inv": torch.ones(dims)})
    refused(fp8, tmp_path, rf"{EXPERT}_scale_inv is \S+ \[.*one scale per block of \[16, 16\]: \[2, 2\]")


def test_a_weight_without_scales(tmp_path: Path) -> None:
    fp8, _ = write_fp8_checkpoint(tmp_path)
    scales = f"{EXPERT}_scale_inv"
    edit_tensors(fp8, lambda tensors: {name: tensors[name] for name in tensors if name != scales})
    refused(fp8, tmp_path, f"{EXPERT} is .* without scales")


@pytest.mark.parametrize("codec", ["nf4", "bf16"])
@pytest.mark.parametrize("name", [EXPERT, "model.layers.0.self_attn.o_proj.weight"])
@pytest.mark.parametrize("where", ["", "_scale_inv"])
def test_nan_weights_and_scales(tmp_path: Path, name: str, where: str, codec: str) -> None:
    fp8, _ = write_fp8_checkpoint(tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name + where][1, 1] = float("nan")

    edit_tensors(fp8, spoil)
    with pytest.raises(CheckpointError, match=f"{name} has NaN"):
        quantize(fp8, tmp_path / "store", codec=codec)


@pytest.mark.parametrize("block", [[128], "128", [0, 128], [128, 128.0], [-1, 1]])
def test_a_block_size_that_is_none(tmp_path: Path, block: object) -> None:
    fp8, _ = write_fp8_checkpoint(tmp_path)
    edit_json(fp8 / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": block})
    refused(fp8, tmp_path, "weight_block_size .* is not a pair")
