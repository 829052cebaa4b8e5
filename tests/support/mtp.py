"""Tiny checkpoints with a layer for multi-token prediction, named as the hub has it."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.chat import END_OF_TEXT, VOCABULARY_SIZE, byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.quantized import edit_json, edit_tensors, fp8_reference, to_fp8

SIZES: dict[str, Any] = {"head_dim": 16, "hidden_size": 64, "max_position_embeddings": 512}
SIZES |= {"vocab_size": VOCABULARY_SIZE, "eos_token_id": END_OF_TEXT}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": SIZES | {"qk_rope_head_dim": 16},  # latents
    "glm4_moe": SIZES,
    "glm4_moe_lite": SIZES,
}
FIRST = "model.layers.3."  # the layer behind the three of the model


def write_mtp_checkpoint(folder: Path, family: str = "deepseek_v3", **changes: Any) -> Path:
    """A random model that can be chatted with, and behind its weights those of the layer."""
    write_checkpoint(folder, family, shard_size="1GB", **FAMILIES[family] | changes)
    byte_tokenizer().save_pretrained(folder)
    edit_json(folder / "config.json", num_nextn_predict_layers=1)
    edit_tensors(folder, lambda tensors: tensors | mtp_tensors(tensors))
    return folder


def mtp_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer like the model's last one, with what stands around it."""
    generator = torch.Generator().manual_seed(7)
    before, (size,) = "model.layers.2.", tensors["model.norm.weight"].shape
    shapes = {name.removeprefix(before): value.shape for name, value in tensors.items() if name.startswith(before)}
    shapes |= {f"{name}.weight": torch.Size([size]) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes["eh_proj.weight"] = torch.Size([size, 2 * size])
    made = {
        FIRST + name: (torch.randn(shape, generator=generator) * 0.1 + ("norm" in name)).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    copies = {"embed_tokens": tensors["model.embed_tokens.weight"], "shared_head.head": tensors["lm_head.weight"]}
    return made | {f"{FIRST}{name}.weight": value.clone() for name, value in copies.items()}


def to_fp8_checkpoint(folder: Path) -> None:
    """Change the experts and attention of the layer to FP8 in blocks, as DeepSeek has them."""
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    edit_json(folder / "config.json", quantization_config=settings)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in fp8_names(tensors):
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensors[name], (16, 16))

    edit_tensors(folder, change)


def round_as_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What those weights stand for."""
    return tensors | {name: fp8_reference(*to_fp8(tensors[name], (16, 16)), (16, 16)) for name in fp8_names(tensors)}


def fp8_names(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.startswith(FIRST) and name.endswith("_proj.weight") and "eh_" not in name]


def settings_of(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "store.json").read_text())
    return settings
