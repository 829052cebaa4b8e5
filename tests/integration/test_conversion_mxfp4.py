"""MXFP4 checkpoints keep their bits, or become what the bf16 model they stand for becomes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from offload_moe import load
from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.quant import get_codec
from offload_moe.store import Store, is_store
from tests.support.checkpoints import write_checkpoint
from tests.support.quantized import WEIGHTS, edit_tensors, write_mxfp4_checkpoint
from tests.support.stores import assert_same_stores

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_mxfp4_checkpoint(tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="module")
def store(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(pair[0], tmp_path_factory.mktemp("stores") / "store")


def test_mxfp4_is_the_default_and_keeps_the_original_bits(pair: tuple[Path, Path], store: Path) -> None:
    opened, tensors = Store.open(store), load_file(pair[0] / WEIGHTS)
    assert opened.codec == "mxfp4"
    for ordinal, layer in enumerate(opened.layers):
        layout = get_codec("mxfp4").layout(layer.shape)
        for expert in range(layer.num_experts):
            record = opened.read_expert(ordinal, expert)
            for name in ("gate_up_proj", "down_proj"):
                blocks = tensors[f"{layer.name}.{name}_blocks"][expert].flatten(1)
                scales = tensors[f"{layer.name}.{name}_scales"][expert]
                order = [*range(0, len(blocks), 2), *range(1, len(blocks), 2)]
                order = order if name == "gate_up_proj" else list(range(len(blocks)))
                columns = blocks.shape[1]
                assert torch.equal(layout.view(record, f"{name}.codes")[:, :columns], blocks[order])
                kept = layout.view(record, f"{name}.scales").view(len(blocks), -1)[:, : scales.shape[1]]
                assert torch.equal(kept, scales[order])


def test_decoded_records_are_transformers_dequantization(pair: tuple[Path, Path], store: Path) -> None:
    opened, reference = Store.open(store), load_file(pair[1] / WEIGHTS)
    for ordinal, layer in enumerate(opened.layers):
        for expert in range(layer.num_experts):
            decoded = get_codec("mxfp4").decode(layer.shape, opened.read_expert(ordinal, expert), torch.bfloat16)
            for name, value in decoded.items():
                assert torch.equal(value, reference[f"{layer.name}.{name}"][expert]), name


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16"])
def test_other_codecs_requantize_what_the_blocks_stand_for(pair: tuple[Path, Path], tmp_path: Path, codec: str) -> None:
    assert_same_stores(quantize(pair[0], tmp_path / "a", codec=codec), quantize(pair[1], tmp_path / "b", codec=codec))


@pytest.mark.parametrize(("codec", "tolerance"), [("bf16", 1e-5), ("mxfp4", 1e-4)])
def test_a_loaded_model_computes_what_the_dequantized_one_does(
    pair: tuple[Path, Path], tmp_path: Path, codec: str, tolerance: float
) -> None:
    store = quantize(pair[0], tmp_path / "store", codec=codec)
    reference = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    ids = torch.arange(1, 13)[None]
    with load(store, dtype=torch.float32, exact=True) as model, torch.no_grad():
        logits = model.hf(ids).logits
        assert logits.abs().sum() > 0
        torch.testing.assert_close(logits, reference(ids).logits, rtol=tolerance, atol=tolerance)


def test_loading_a_checkpoint_keeps_its_format_once(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    for source, codec in zip(pair, ("mxfp4", "nf4"), strict=True):
        with load(source) as model:
            assert model.store.codec == codec
            written = model.store.path
        with load(source, codec=codec) as model:
            assert model.store.path == written
    with load(pair[0], codec="nf4") as model:
        assert model.store.codec == "nf4"


def test_pieces_are_read_expert_by_expert(pair: tuple[Path, Path]) -> None:
    with Checkpoint(pair[0]) as checkpoint:
        assert checkpoint.is_mxfp4
        whole = checkpoint.tensors.read(EXPERTS)
        assert torch.equal(checkpoint.tensors.read_rows(EXPERTS, 1, 3), whole[1:3])
        assert torch.equal(torch.cat([*checkpoint.tensors.chunks(EXPERTS, 1)]), whole.reshape(-1).view(torch.uint8))
    with Checkpoint(pair[1]) as checkpoint:
        assert not checkpoint.is_mxfp4


def test_numbers_that_never_were_mxfp4_are_not_made_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"mxfp4 keeps the bits of checkpoints in MXFP4, .* Use nf4"):
        quantize(tmp_path / "model", tmp_path / "store", codec="mxfp4")
    with pytest.raises(ConfigError, match="mxfp4 is a format of experts"):
        quantize(tmp_path / "model", tmp_path / "store", dense_codec="mxfp4")
    assert not is_store(tmp_path / "store")


def test_a_width_that_is_no_multiple_of_two_blocks(tmp_path: Path) -> None:
    quantized, plain = write_mxfp4_checkpoint(tmp_path, hidden_size=96, intermediate_size=32)
    assert_same_stores(quantize(quantized, tmp_path / "a", codec="nf4"), quantize(plain, tmp_path / "b", codec="nf4"))
    store = Store.open(quantize(quantized, tmp_path / "store"))
    decoded = get_codec("mxfp4").decode(store.layers[1].shape, store.read_expert(1, 2), torch.bfloat16)
    assert torch.equal(decoded["gate_up_proj"], load_file(plain / WEIGHTS)[EXPERTS][2])


@pytest.mark.parametrize(
    ("suffix", "value", "match"),
    [
        ("_scales", None, f"{EXPERTS}_blocks has no scales"),
        ("_scales", torch.zeros(4, 192, 3, dtype=torch.uint8), r"expected one byte per group: \[4, 192, 2\]"),
        ("_blocks", torch.zeros(4, 192, 2, 8, dtype=torch.uint8), r"expected \[experts, rows, groups, 16\]"),
        ("_blocks", torch.zeros(4, 192, 32, dtype=torch.uint8), r"expected \[experts, rows, groups, 16\]"),
        ("_blocks", None, f"{EXPERTS}_scales has no place"),
    ],
)
def test_damaged_blocks_and_scales(tmp_path: Path, suffix: str, value: torch.Tensor | None, match: str) -> None:
    quantized, _ = write_mxfp4_checkpoint(tmp_path)
    name = EXPERTS + suffix
    edit_tensors(quantized, lambda t: {k: v for k, v in (t | {name: value}).items() if v is not None})
    with pytest.raises(CheckpointError, match=match):
        quantize(quantized, tmp_path / "store")


@pytest.mark.parametrize("codec", ["mxfp4", "nf4", "bf16"])
def test_a_scale_that_is_no_number(tmp_path: Path, codec: str) -> None:
    quantized, _ = write_mxfp4_checkpoint(tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERTS}_scales"][2, 7, 1] = 255

    edit_tensors(quantized, spoil)
    with pytest.raises(CheckpointError, match=r"Expert 2 of model\.layers\.1\.mlp\.experts: .*NaN"):
        quantize(quantized, tmp_path / "store", codec=codec)


def test_the_config_of_the_store_stays_as_it_was(pair: tuple[Path, Path], store: Path) -> None:
    assert (store / "config.json").read_bytes() == (pair[0] / "config.json").read_bytes()
    assert json.loads((store / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
