"""Checkpoints in the quantized formats people download, each beside the bf16 checkpoint that it stands for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import write_checkpoint

WEIGHTS = "model.safetensors"
DELICATE = ("gate.weight", "embed_tokens.weight", "lm_head.weight", "norm.weight", "layernorm.weight")
FP8_MAX = 448.0


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    """Rewrite the single weight file of a checkpoint; `change` edits the dict or returns another."""
    path = folder / WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    changed = change(tensors)
    save_file(tensors if changed is None else changed, path, metadata={"format": "pt"})


def write_fp8_checkpoint(
    folder: Path, block: tuple[int, int] = (16, 16), family: str = "deepseek_v3", **changes: object
) -> tuple[Path, Path]:
    """A DeepSeek-V3 as the hub has it, with a layer for multi-token prediction, and the bf16 model that it stands for.

    Blocks are small, as the model is.
    """
    quantized, plain = folder / "fp8", folder / "bf16"
    write_checkpoint(plain, family, shard_size="1GB", **changes)
    shutil.copytree(plain, quantized)
    edit_json(
        quantized / "config.json",
        quantization_config={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(block),
        },
        num_nextn_predict_layers=1,
    )
    stood_for: dict[str, Tensor] = {}

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name, value in list(tensors.items()):
            if value.dim() == 2 and not name.endswith(DELICATE):
                tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(value, block)
                stood_for[name] = fp8_reference(tensors[name], tensors[f"{name}_scale_inv"], block)
        last = json.loads((plain / "config.json").read_text())["num_hidden_layers"]
        for name in [name for name in tensors if f"layers.{last - 1}." in name]:
            tensors[name.replace(f"layers.{last - 1}.", f"layers.{last}.")] = tensors[name].clone()
        tensors[f"model.layers.{last}.eh_proj.weight"] = torch.zeros(32, 64, dtype=torch.bfloat16)

    edit_tensors(quantized, quantize)
    edit_tensors(plain, lambda tensors: tensors | stood_for)
    return quantized, plain


def to_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """FP8 codes and a scale per block; the last row and column of blocks may be narrower."""
    grid = [-(-size // length) for size, length in zip(weight.shape, block, strict=True)]
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[place].float().abs().max() / FP8_MAX
            codes[place] = (weight[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def fp8_reference(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The slow way round: every weight looks up its own scale."""
    rows, columns = (torch.arange(size) // length for size, length in zip(codes.shape, block, strict=True))
    return (codes.double() * scales.double()[rows[:, None], columns[None, :]]).float().to(torch.bfloat16)


def write_mxfp4_checkpoint(folder: Path, **changes: object) -> tuple[Path, Path]:
    """A gpt-oss as the hub has it, and the bf16 model that transformers makes of it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    quantized, plain = folder / "mxfp4", folder / "bf16"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16} | changes
    write_checkpoint(plain, "gpt_oss", shard_size="1GB", **sizes)
    shutil.copytree(plain, quantized)
    edit_json(
        quantized / "config.json",
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    )
    generator = torch.Generator().manual_seed(0)
    stood_for: dict[str, Tensor] = {}

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            num_experts, columns, rows = tensors.pop(name).shape
            grid = (num_experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*grid, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(119, 124, grid, generator=generator, dtype=torch.uint8)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            stood_for[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)

    edit_tensors(quantized, quantize)
    edit_tensors(plain, lambda tensors: tensors | stood_for)
    return quantized, plain
