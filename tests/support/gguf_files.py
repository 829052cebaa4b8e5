"""GGUF files of tiny models, written as llama.cpp's converter writes them, beside the model's config."""

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from tests.support.checkpoints import write_checkpoint
from tests.support.quantized import edit_tensors

ARCHITECTURES = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "head_dim": 16,
}
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def write_gguf(
    folder: Path,
    family: str,
    kind: gguf.GGMLQuantizationType = Q8_0,
    architecture: str | None = None,
    tensors_per_file: int = 0,
) -> tuple[Path, Path]:
    """A folder with `model.gguf` or its parts, and its config; and the checkpoint that it stands for."""
    quantized, plain = folder / "gguf", folder / "plain"
    model = write_checkpoint(plain, family, shard_size="1GB", **SIZES)
    quantized.mkdir()
    (quantized / "config.json").write_bytes((plain / "config.json").read_bytes())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[family].upper()], model.config.num_hidden_layers)
    architecture_name = architecture or ARCHITECTURES[family]
    writer = gguf.GGUFWriter(quantized / "model.gguf", architecture_name, split_max_tensors=tensors_per_file)
    stood_for: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        for stored_as, part in _as_llama_cpp(name, value.float(), model.config, names):
            used = kind if part.dim() > 1 and "gate_inp" not in stored_as else gguf.GGMLQuantizationType.F32
            data = gguf.quantize(part.numpy(), used)
            writer.add_tensor(stored_as, data, raw_dtype=used)
        stood_for[name] = _rounded(name, value.float(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    edit_tensors(plain, lambda tensors: stood_for)  # under the names of the model, experts fused
    return quantized, plain


def _as_llama_cpp(name: str, value: Tensor, config: Any, names: Any) -> list[tuple[str, Tensor]]:
    stem, kind = (name, "weight") if name.endswith(("_proj", "gate_up_proj")) else tuple(name.rsplit(".", 1))
    block = name.split(".")[2] if ".layers." in name else ""
    if name.endswith("experts.gate_up_proj"):
        gate, up = value.chunk(2, dim=1)
        halves = {"gate": gate, "up": up}
        return [(f"blk.{block}.ffn_{half}_exps.weight", part.contiguous()) for half, part in halves.items()]
    if name.endswith("experts.down_proj"):
        return [(f"blk.{block}.ffn_down_exps.weight", value)]
    if config.model_type == "mixtral" and stem.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
        value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if name.endswith("shared_expert_gate.weight"):
        value = value[0]
    return [(f"{names.get_name(stem)}.{kind}", value.contiguous())]


def _rounded(name: str, value: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    if value.dim() == 1 or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
        return value
    rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind)).view(value.shape)
    kept = {"F32": torch.float32, "F16": torch.float16}.get(kind.name, torch.bfloat16)
    return rounded.to(kept)
