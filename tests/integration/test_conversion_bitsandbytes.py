"""bitsandbytes' 4-bit checkpoints become the stores of the models that they stand for."""

import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError
from tests.support.checkpoints import write_checkpoint
from tests.support.quantized import DELICATE, edit_json, edit_tensors
from tests.support.stores import assert_same_stores

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
STATE = f"{EXPERT}.quant_state.bitsandbytes__nf4"


def write(folder: Path, kind: str = "nf4", is_nested: bool = True) -> tuple[Path, Path]:
    quantized, plain = folder / "quantized", folder / "plain"
    write_checkpoint(plain, shard_size="1GB")
    shutil.copytree(plain, quantized)
    edit_json(quantized / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    stood_for: dict[str, Tensor] = {}

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if tensors[name].dim() == 2 and not name.endswith(DELICATE)]:
            packed, state = quantize_4bit(tensors[name], compress_statistics=is_nested, quant_type=kind)
            stood_for[name] = dequantize_4bit(packed, state)
            tensors[name] = packed
            tensors.update({f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()})

    edit_tensors(quantized, pack)
    edit_tensors(plain, lambda tensors: tensors | stood_for)
    return quantized, plain


@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_store_has_the_bytes_of_the_model_it_stands_for(tmp_path: Path, kind: str, is_nested: bool) -> None:
    quantized, plain = write(tmp_path, kind, is_nested)
    for codec in ("nf4", "bf16"):
        a, b = (quantize(source, tmp_path / f"{source.name}-{codec}", codec=codec) for source in (quantized, plain))
        assert_same_stores(a, b)


def test_eight_bits_are_refused(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path)
    edit_json(quantized / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(CheckpointError, match="bitsandbytes to 8 bits, which cannot be read"):
        quantize(quantized, tmp_path / "store")


def text(content: str) -> Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (f"{EXPERT}.absmax", None, "absmax is missing"),
        (f"{EXPERT}.absmax", torch.zeros(3, dtype=torch.uint8), r"absmax is \[3\], expected 12 numbers"),
        (f"{EXPERT}.nested_quant_map", torch.zeros(3), r"nested_quant_map is \[3\], expected 256 numbers"),
        (EXPERT, None, "which is missing"),
        (EXPERT, torch.zeros(5, 1, dtype=torch.uint8), r"has 5 bytes for weights \[24, 32\]"),
        (STATE, text("{"), "is not a quantization state"),
        (STATE, text("[]"), "is not a quantization state"),
        (STATE, text('{"shape": [24, 32], "dtype": "int3", "blocksize": 64}'), "is not a quantization state"),
        (STATE, text('{"shape": [24, 32], "dtype": "float16", "blocksize": 0}'), "is not a quantization state"),
        (STATE, text('{"shape": [-24, -32], "dtype": "float16", "blocksize": 64}'), "bytes for weights"),
        (STATE, text('{"shape": [768], "dtype": "float16", "blocksize": 64}'), "bytes for weights"),
        (f"{EXPERT}.nested_absmax", torch.full((1,), torch.nan), "NaN or infinite weights"),
    ],
)
def test_damaged_states(tmp_path: Path, name: str, value: Tensor | None, match: str) -> None:
    quantized, _ = write(tmp_path)
    edit_tensors(quantized, lambda t: {k: v for k, v in (t | {name: value}).items() if v is not None})
    with pytest.raises(CheckpointError, match=match):
        quantize(quantized, tmp_path / "store")
