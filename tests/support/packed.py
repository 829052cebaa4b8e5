"""Checkpoints of packed integers, written word by word as their formats describe them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.support.checkpoints import write_checkpoint
from tests.support.quantized import DELICATE, edit_json, edit_tensors

GROUP = 8
AWQ_PACKING = [0, 2, 4, 6, 1, 3, 5, 7]  # which output goes to each place of a word

Parts = dict[str, Tensor]


def write_packed_checkpoint(folder: Path, method: str, bits: int = 4) -> tuple[Path, Path]:
    """A Qwen3-MoE in one of the formats, and the fp16 or bf16 model that it stands for."""
    packed, plain = folder / method, folder / "plain"
    dtype = torch.bfloat16 if method == "compressed-tensors" else torch.float16
    write_checkpoint(plain, shard_size="1GB", dtype=dtype)
    shutil.copytree(plain, packed)
    weights: dict[str, object] = {"num_bits": bits, "symmetric": True, "group_size": GROUP, "strategy": "group"}
    settings: dict[str, dict[str, object]] = {
        "compressed-tensors": {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}},
        "gptq": {"bits": bits, "group_size": GROUP, "desc_act": True},
        "gptq_v2": {"bits": bits, "group_size": GROUP, "desc_act": True, "checkpoint_format": "gptq_v2"},
        "awq": {"bits": bits, "group_size": GROUP, "version": "gemm", "zero_point": True},
    }
    quant_method = method.removesuffix("_v2")
    edit_json(packed / "config.json", quantization_config={"quant_method": quant_method} | settings[method])
    pack: Callable[..., Parts] = {
        "compressed-tensors": pack_compressed,
        "gptq": lambda *parts: pack_gptq(*parts, stored_less=1),
        "gptq_v2": lambda *parts: pack_gptq(*parts, stored_less=0),
        "awq": pack_awq,
    }[method]
    generator = torch.Generator().manual_seed(0)
    stood_for: Parts = {}

    def quantize(tensors: Parts) -> None:
        for name in [name for name in tensors if tensors[name].dim() == 2 and not name.endswith(DELICATE)]:
            rows, columns = tensors.pop(name).shape
            codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
            middle = torch.full((rows, columns // GROUP), 1 << (bits - 1))
            zeros = torch.randint(0, 1 << bits, middle.shape, generator=generator)
            zeros = middle if method == "compressed-tensors" else zeros
            scales = (torch.rand(middle.shape, generator=generator) * 0.02).to(dtype)
            groups = torch.arange(columns) // GROUP
            if method.startswith("gptq"):
                groups = groups[torch.randperm(columns, generator=generator)]
            tensors.update(
                {name.removesuffix("weight") + k: v for k, v in pack(codes, zeros, scales, groups, bits).items()}
            )
            exact = (codes - zeros[:, groups]).double() * scales[:, groups].double()
            stood_for[name] = exact.float().to(dtype)

    edit_tensors(packed, quantize)
    edit_tensors(plain, lambda tensors: tensors | stood_for)
    return packed, plain


def words(codes: Tensor, bits: int) -> Tensor:
    """Along rows: the first code in the lowest bits of an int32."""
    per_word = 32 // bits
    packed = [
        [
            sum(code << (bits * place) for place, code in enumerate(row[i : i + per_word]))
            for i in range(0, len(row), per_word)
        ]
        for row in codes.tolist()
    ]
    return torch.tensor([[word - (1 << 32) if word >= 1 << 31 else word for word in row] for row in packed]).int()


def pack_compressed(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, bits: int) -> Parts:
    return {
        "weight_packed": words(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }


def pack_gptq(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, bits: int, *, stored_less: int) -> Parts:
    return {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words((zeros.T - stored_less) % (1 << bits), bits),
        "scales": scales.T.contiguous(),
        "g_idx": groups.int(),
    }


def pack_awq(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, bits: int) -> Parts:
    def interleaved(values: Tensor) -> Tensor:
        return words(values.T.unflatten(1, (-1, 8))[..., AWQ_PACKING].flatten(1), bits)

    return {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales.T.contiguous()}
