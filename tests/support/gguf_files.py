"""GGUF files of tiny models, written as llama.cpp's converter writes them, beside the model's config."""

from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from tests.support.checkpoints import write_checkpoint
from tests.support.quantized import WEIGHTS, edit_tensors

ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "minimax_m2": "minimax-m2",
    "dots1": "dots1",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "exaone_moe": "exaone-moe",
    "afmoe": "afmoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "ernie4_5_moe": "ernie4_5-moe",
    "lfm2_moe": "lfm2moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe_text": "qwen35moe",
}
PERMUTED = ("mixtral", "granitemoe", "granitemoeshared")
OF_DELTA_RULES = ("qwen3_next", "qwen3_5_moe_text")  # test_gguf_in_place.py has those, which change values
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
IN_FP32 = ("norm.weight", "bias", "sinks", "router.weight")
IN_FILE_AS_THEY_ARE = (
    "feed_forward.gate.weight",
    "conv.conv.weight",
    "mlp.gate.weight",
    "gate.wg.weight",
    "shared_expert_gate.weight",
    "router.weight",
    "router.gate.weight",
    "_bias",
)
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def write_gguf(
    folder: Path,
    family: str,
    kind: gguf.GGMLQuantizationType = Q8_0,
    architecture: str | None = None,
    tensors_per_file: int = 0,
    *,
    is_latent_split: bool = True,
    without: str = "",
) -> tuple[Path, Path]:
    """A folder with `model.gguf` or its parts, and its config; and the checkpoint that it stands for.

    is_latent_split: DeepSeek's keys and values of the latent are two tensors, as llama.cpp has them since 2025.
    without: a tensor that is left out.
    """
    quantized, plain = folder / "gguf", folder / "plain"
    model = write_checkpoint(plain, family, shard_size="1GB", **sizes_of(family))
    quantized.mkdir()
    (quantized / "config.json").write_bytes((plain / "config.json").read_bytes())
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[ARCHITECTURES[family]], model.config.num_hidden_layers)
    architecture_name = architecture or ARCHITECTURES[family]
    writer = gguf.GGUFWriter(quantized / "model.gguf", architecture_name, split_max_tensors=tensors_per_file)
    stood_for: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for stored_as, part in as_llama_cpp(name, value.float(), model.config, names, is_latent_split):
            if stored_as == without:
                continue
            is_kept = part.dim() == 1 or any(word in stored_as for word in ("gate_inp", "bias", "shortconv.conv."))
            used = gguf.GGMLQuantizationType.F32 if is_kept else kind
            data = gguf.quantize(part.numpy(), used)
            writer.add_tensor(stored_as, data, raw_dtype=used)
        stood_for[name] = _rounded(name, value.float(), kind, model.config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    edit_tensors(plain, lambda tensors: stood_for)  # under the names of the model, experts fused
    return quantized, plain


def write_mxfp4_gguf(folder: Path, checkpoint: Path) -> Path:
    """A gpt-oss with MXFP4 experts as GGUF. Vectors of the checkpoint are made fp32, as the file has them."""
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    edit_tensors(checkpoint, lambda t: {n: v.float() if n.endswith(IN_FP32) else v for n, v in t.items()})
    tensors = load_file(checkpoint / WEIGHTS)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, 99)
    writer = gguf.GGUFWriter(folder / "model.gguf", "gpt-oss")
    config = AutoConfig.from_pretrained(checkpoint)
    for name, value in tensors.items():
        if name.endswith("_blocks"):
            packed = torch.cat([tensors[name.replace("_blocks", "_scales")][..., None], _as_ggml(value)], dim=-1)
            parameter, block = name.rpartition(".")[2].removesuffix("_blocks"), name.split(".")[2]
            turned = packed.flatten(2).transpose(1, 2)  # as a matrix [in, out], which `_experts` takes
            for part, rows in _experts(parameter, turned, config):
                writer.add_tensor(f"blk.{block}.ffn_{part}", rows.numpy(), raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        elif not name.endswith("_scales"):
            kind = gguf.GGMLQuantizationType.F32 if value.dtype == torch.float32 else gguf.GGMLQuantizationType.BF16
            for stored_as, part in as_llama_cpp(name, value.float(), config, names):
                writer.add_tensor(stored_as, gguf.quantize(part.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def _as_ggml(blocks: Tensor) -> Tensor:
    """Neighbours in a byte -> the first half of a block in low nibbles, the second in high ones."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    return codes[..., :16] | codes[..., 16:] << 4


def sizes_of(family: str) -> dict[str, Any]:
    """What a family has of the sizes that quantized rows need."""
    return (
        SIZES
        if ARCHITECTURES[family] == "deepseek2"
        else {k: v for k, v in SIZES.items() if not k.endswith(("rank", "nope_head_dim", "v_head_dim"))}
    )


def as_llama_cpp(
    name: str, value: Tensor, config: Any, names: Any, is_latent_split: bool = True
) -> list[tuple[str, Tensor]]:
    block = name.split(".")[2] if ".layers." in name else ""
    if ".experts." in name:
        return [(f"blk.{block}.ffn_{part}", rows) for part, rows in _experts(name.rpartition(".")[2], value, config)]
    if name.endswith("kv_b_proj.weight") and is_latent_split:
        keys, values = value.unflatten(0, (config.num_attention_heads, -1)).split(
            [config.qk_nope_head_dim, config.v_head_dim], dim=1
        )
        halves = {"k_b": keys.transpose(1, 2), "v_b": values}
        return [(f"blk.{block}.attn_{half}.weight", part.contiguous()) for half, part in halves.items()]
    if name.endswith(("e_score_correction_bias", "expert_bias")):
        return [(f"blk.{block}.exp_probs_b.bias", value.flatten())]
    if ".linear_attn." in name:
        return as_delta_rule(name, value, config)
    if name.endswith("shared_mlp.input_linear.weight"):
        return [
            (f"blk.{block}.ffn_{half}_shexp.weight", part)
            for half, part in zip(("gate", "up"), value.chunk(2), strict=True)
        ]
    if name.endswith("sinks"):
        return [(f"blk.{block}.attn_sinks.weight", value)]
    stem, kind = name.rsplit(".", 1)
    if config.model_type in PERMUTED and stem.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
        value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if name.endswith("shared_expert_gate.weight"):
        value = value[0]
    if name.endswith(".conv.conv.weight"):
        value = value[:, 0]
    found = names.get_name(stem) or names.get_name(f"{stem}.layer")  # as Granite's files have its router
    return [(f"{found}.{kind}", value.contiguous())]


def as_delta_rule(name: str, value: Tensor, config: Any) -> list[tuple[str, Tensor]]:
    """As `Qwen3NextModel` and `_LinearAttentionVReorderBase` of conversion/qwen.py change it, values included."""
    inside, block = name.partition(".linear_attn.")[2], f"blk.{name.split('.')[2]}."
    num_keys, num_values = config.linear_num_key_heads, config.linear_num_value_heads
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    shared = num_values // num_keys

    def tiled(rows: Tensor, size: int) -> Tensor:
        if config.model_type == "qwen3_next":
            return rows
        return rows.reshape(num_keys, shared, size, -1).transpose(0, 1).reshape(rows.shape)

    def tiled_behind_keys(rows: Tensor) -> Tensor:
        keys = 2 * num_keys * key_dim
        return torch.cat([rows[:keys], tiled(rows[keys:], value_dim)])

    if inside == "in_proj_qkvz.weight":
        sizes = [key_dim, key_dim, shared * value_dim, shared * value_dim]
        *mixed, gates = (part.flatten(0, 1) for part in value.unflatten(0, (num_keys, -1)).split(sizes, dim=1))
        return [(f"{block}attn_qkv.weight", torch.cat(mixed)), (f"{block}attn_gate.weight", gates.contiguous())]
    changes = {
        "in_proj_ba.weight": ("ssm_ba.weight", lambda rows: rows),
        "in_proj_qkv.weight": ("attn_qkv.weight", tiled_behind_keys),
        "in_proj_z.weight": ("attn_gate.weight", lambda rows: tiled(rows, value_dim)),
        "in_proj_b.weight": ("ssm_beta.weight", lambda rows: tiled(rows, 1)),
        "in_proj_a.weight": ("ssm_alpha.weight", lambda rows: tiled(rows, 1)),
        "out_proj.weight": ("ssm_out.weight", lambda matrix: tiled(matrix.T, value_dim).T),
        "conv1d.weight": ("ssm_conv1d.weight", lambda kernels: tiled_behind_keys(kernels[:, 0])),
        "norm.weight": ("ssm_norm.weight", lambda weight: weight),
        "dt_bias": ("ssm_dt.bias", lambda bias: tiled(bias, 1)),
        "A_log": ("ssm_a", lambda logarithm: -tiled(logarithm, 1).exp()),
    }
    stored_as, change = changes[inside]
    return [(block + stored_as, change(value).contiguous())]


def _experts(parameter: str, value: Tensor, config: Any) -> list[tuple[str, Tensor]]:
    """Fused experts, as gate, up and down; gpt-oss has matrices as [in, out], gate and up in turn."""
    kind = "bias" if parameter.endswith("_bias") else "weight"
    is_turned = config.model_type == "gpt_oss"
    rows = value.transpose(1, 2) if is_turned and kind == "weight" else value
    if parameter.startswith("down_proj"):
        return [(f"down_exps.{kind}", rows.contiguous())]
    gate, up = (rows[:, 0::2], rows[:, 1::2]) if is_turned else rows.chunk(2, dim=1)
    return [(f"gate_exps.{kind}", gate.contiguous()), (f"up_exps.{kind}", up.contiguous())]


def _rounded(name: str, value: Tensor, kind: gguf.GGMLQuantizationType, config: Any) -> Tensor:
    if value.dim() == 1 or name.endswith(IN_FILE_AS_THEY_ARE):
        return value
    kept = {"F32": torch.float32, "F16": torch.float16}.get(kind.name, torch.bfloat16)
    if name.endswith("kv_b_proj.weight"):
        keys, values = (_round(part, kind) for _, part in as_llama_cpp(name, value, config, None))
        return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1).to(kept)
    is_turned = config.model_type == "gpt_oss" and ".mlp.experts." in name
    rounded = _round(value.transpose(1, 2).contiguous(), kind).transpose(1, 2) if is_turned else _round(value, kind)
    return rounded.to(kept).contiguous()


def _round(value: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    return torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind)).view(value.shape)
