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
LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": SIZES | {"qk_rope_head_dim": 16},  # latents
    "glm4_moe": SIZES,
    "glm4_moe_lite": SIZES,
    "hy_v3": SIZES | {"qk_norm": True},
    "qwen3_next": SIZES | LINEAR,
    "qwen3_5_moe_text": SIZES | LINEAR,
}
FIRST = "model.layers.3."  # the layer behind the three of the model
OWN = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}
APART = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "norm": "norm"}


def write_mtp_checkpoint(folder: Path, family: str = "deepseek_v3", **changes: Any) -> Path:
    """A random model that can be chatted with, and beside its weights those of the layer."""
    write_checkpoint(folder, family, shard_size="1GB", **FAMILIES[family] | changes)
    byte_tokenizer().save_pretrained(folder)
    edit_json(folder / "config.json", **counts_of(family))
    edit_tensors(folder, lambda tensors: tensors | mtp_tensors(tensors, family))
    return folder


def counts_of(family: str) -> dict[str, int]:
    """What a config says of the layer: Qwen3-Next's nothing."""
    name = {"qwen3_5_moe_text": "mtp_num_hidden_layers"}.get(family, "num_nextn_predict_layers")
    return {} if family == "qwen3_next" else {name: 1}


def own_names(family: str) -> dict[str, str]:
    """Part -> its whole name, without `.weight`; those of the decoder layer stand behind `layer`."""
    if family.startswith("qwen"):
        return {"layer": "mtp.layers.0."} | {part: f"mtp.{name}" for part, name in APART.items()}
    names = OWN | ({"norm": "final_layernorm"} if family == "hy_v3" else {})
    return {"layer": FIRST} | {part: FIRST + name for part, name in names.items()}


def mtp_tensors(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """A layer like the model's last one, with what stands around it."""
    generator = torch.Generator().manual_seed(7)
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    before, (size,) = f"model.layers.{last}.", tensors["model.norm.weight"].shape
    own, starts_at = own_names(family), 0.0 if family.startswith("qwen") else 1.0  # Qwen's norms add one to weights
    shapes = {
        name.replace(before, own["layer"]): value.shape for name, value in tensors.items() if name.startswith(before)
    }
    shapes |= {f"{own[part]}.weight": torch.Size([size]) for part in ("enorm", "hnorm", "norm")}
    shapes[f"{own['eh_proj']}.weight"] = torch.Size([size, 2 * size])
    made = {
        name: (torch.randn(shape, generator=generator) * 0.1 + starts_at * ("norm" in name)).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    if own["layer"] != FIRST:
        return made
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


def settings_of(folder: Path, name: str = "store.json") -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / name).read_text())
    return settings
