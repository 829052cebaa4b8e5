"""bitsandbytes' checkpoints become the stores of the models that they stand for."""

import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, int8_vectorwise_quant, quantize_4bit
from torch import Tensor

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError
from tests.support.checkpoints import write_checkpoint
from tests.support.quantized import DELICATE, edit_json, edit_tensors
from tests.support.stores import assert_same_stores

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
STATE = f"{EXPERT}.quant_state.bitsandbytes__nf4"
FUSED = ("experts.gate_up_proj", "experts.down_proj")


def write(
    folder: Path,
    kind: str = "nf4",
    *,
    is_nested: bool = True,
    storage: torch.dtype = torch.uint8,
    block: int = 64,
    family: str = "qwen3_moe",
) -> tuple[Path, Path]:
    """A checkpoint in 4 bits, and the one that it stands for. gpt-oss has fused experts in its checkpoints."""
    quantized, plain = folder / "quantized", folder / "plain"
    write_checkpoint(plain, family, shard_size="1GB")
    shutil.copytree(plain, quantized)
    edit_json(quantized / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    stood_for: dict[str, Tensor] = {}

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if is_quantized(name, tensors[name])]:
            packed, state = quantize_4bit(
                tensors[name], compress_statistics=is_nested, quant_type=kind, quant_storage=storage, blocksize=block
            )
            stood_for[name] = reference(packed, state)
            tensors[name] = packed
            tensors.update({f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()})

    edit_tensors(quantized, pack)
    edit_tensors(plain, lambda tensors: tensors | stood_for)
    return quantized, plain


def is_quantized(name: str, value: Tensor) -> bool:
    return name.endswith(FUSED) or (value.dim() == 2 and not name.endswith((*DELICATE, "router.weight", "_bias")))


def reference(packed: Tensor, state: QuantState) -> Tensor:
    """Every weight looks up its own level and its own scale."""
    codes = torch.stack([packed.view(torch.uint8) >> 4, packed.view(torch.uint8) & 15], dim=-1).flatten()
    absmax = state.absmax
    if state.nested:
        scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(absmax)]
        absmax = state.state2.code[absmax.long()] * scales + state.offset
    values = state.code[codes.long()] * absmax.repeat_interleave(state.blocksize)[: len(codes)]
    return values.view(state.shape).to(state.dtype)


@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_store_has_the_bytes_of_the_model_it_stands_for(tmp_path: Path, kind: str, is_nested: bool) -> None:
    quantized, plain = write(tmp_path, kind, is_nested=is_nested)
    for codec in ("nf4", "bf16"):
        a, b = (quantize(source, tmp_path / f"{source.name}-{codec}", codec=codec) for source in (quantized, plain))
        assert_same_stores(a, b)


@pytest.mark.parametrize(
    ("family", "storage", "is_nested", "block"),
    [
        ("qwen3_moe", torch.bfloat16, True, 64),
        ("qwen3_moe", torch.float16, False, 128),
        ("qwen3_moe", torch.float32, True, 64),
        ("gpt_oss", torch.uint8, True, 64),
        ("gpt_oss", torch.bfloat16, True, 128),
        ("gpt_oss", torch.float32, False, 64),
    ],
)
def test_other_storage_and_fused_experts(
    tmp_path: Path, family: str, storage: torch.dtype, is_nested: bool, block: int
) -> None:
    quantized, plain = write(tmp_path, family=family, storage=storage, is_nested=is_nested, block=block)
    a, b = (quantize(source, tmp_path / f"{source.name}-store", codec="bf16") for source in (quantized, plain))
    assert_same_stores(a, b)


@pytest.mark.parametrize("is_nested", [True, False])
def test_rows_are_those_of_the_whole(tmp_path: Path, is_nested: bool) -> None:
    """Also where rows begin inside a block of weights, or of scales."""
    name = "model.layers.0.self_attn.q_proj.weight"
    with Checkpoint(write(tmp_path, is_nested=is_nested, block=128)[0]) as checkpoint:
        whole = checkpoint.tensors.read(name)
        assert whole.abs().sum() > 0
        for start, stop in ((0, 1), (3, 11), (5, 6), (len(whole) - 1, len(whole))):
            assert torch.equal(checkpoint.tensors.read_rows(name, start, stop), whole[start:stop])


def write_8_bits(folder: Path, layout: int = 0) -> tuple[Path, Path]:
    """LLM.int8, and the fp16 numbers that it stands for."""
    quantized, plain = folder / "quantized", folder / "plain"
    write_checkpoint(plain, shard_size="1GB", dtype=torch.float16)
    shutil.copytree(plain, quantized)
    edit_json(quantized / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    stood_for: dict[str, Tensor] = {}

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if is_quantized(name, tensors[name])]:
            prefix = name.removesuffix("weight")
            tensors[name], tensors[f"{prefix}SCB"], _ = int8_vectorwise_quant(tensors[name])
            tensors[f"{prefix}weight_format"] = torch.tensor(layout, dtype=torch.uint8)
            rows = [
                row.float() * scale / 127 for row, scale in zip(tensors[name], tensors[f"{prefix}SCB"], strict=True)
            ]
            stood_for[name] = torch.stack(rows).half()

    edit_tensors(quantized, pack)
    edit_tensors(plain, lambda tensors: tensors | stood_for)
    return quantized, plain


def test_eight_bits(tmp_path: Path) -> None:
    quantized, plain = write_8_bits(tmp_path)
    with Checkpoint(quantized) as found, Checkpoint(plain) as expected:
        for name in expected.dense:
            torch.testing.assert_close(found.dense_tensor(name), expected.dense_tensor(name), rtol=1e-3, atol=1e-7)
        for part, value in expected.expert(1, 2).items():
            assert value.abs().sum() > 0
            torch.testing.assert_close(found.expert(1, 2)[part], value, rtol=1e-3, atol=1e-7)


def test_eight_bits_in_tiles_are_refused(tmp_path: Path) -> None:
    quantized, _ = write_8_bits(tmp_path, layout=2)
    with pytest.raises(CheckpointError, match=r"weight is in a tiled layout of LLM.int8.* Use a version"):
        quantize(quantized, tmp_path / "store")


def text(content: str) -> Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (f"{EXPERT}.absmax", None, r"absmax \(bitsandbytes\) is missing"),
        (f"{EXPERT}.absmax", torch.zeros(3, dtype=torch.uint8), r"absmax .* \[3\], expected 12 numbers"),
        (f"{EXPERT}.absmax", torch.zeros(12), r"absmax .* torch.float32 \[12\], expected 12 numbers"),
        (f"{EXPERT}.nested_quant_map", torch.zeros(3), r"nested_quant_map .* \[3\], expected 256 numbers"),
        (EXPERT, None, "which is missing"),
        (EXPERT, torch.zeros(5, 1, dtype=torch.uint8), r"has 5 bytes for weights \[24, 32\] in 4 bits"),
        (STATE, text("{"), "is not a quantization state"),
        (STATE, text("[]"), "is not a quantization state"),
        (STATE, text('{"shape": [24, 32], "dtype": "int3", "blocksize": 64}'), "is not a quantization state"),
        (STATE, text('{"shape": [24, 32], "dtype": "float16", "blocksize": 0}'), "is not a quantization state"),
        (STATE, text('{"shape": [24, 32], "dtype": "float16", "blocksize": 64.0}'), "is not a quantization state"),
        (STATE, text('{"shape": [-24, -32], "dtype": "float16", "blocksize": 64}'), "is not a quantization state"),
        (STATE, text('{"shape": [768], "dtype": "float16", "blocksize": 64}'), "bytes for weights"),
        (f"{EXPERT}.nested_absmax", torch.full((1,), torch.nan), "NaN or infinite weights"),
    ],
)
def test_damaged_states(tmp_path: Path, name: str, value: Tensor | None, match: str) -> None:
    quantized, _ = write(tmp_path)
    edit_tensors(quantized, lambda t: {k: v for k, v in (t | {name: value}).items() if v is not None})
    with pytest.raises(CheckpointError, match=match):
        quantize(quantized, tmp_path / "store")
