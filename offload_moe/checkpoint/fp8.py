"""FP8 weights with one scale per block of rows and columns: DeepSeek-V3 and R1, Kimi K2, MiniMax M2.

A weight ``[R, C]`` in float8_e4m3fn comes with ``weight_scale_inv [ceil(R/128), ceil(C/128)]`` in fp32, which despite
its name is multiplied. Values are bf16, as transformers dequantizes them. Fused experts have a leading dimension.

Source: DeepSeek-V3's inference/kernel.py, `weight_dequant`; transformers/integrations/finegrained_fp8.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.tensors import DequantizedTensors, TensorSource
from offload_moe.errors import CheckpointError

SCALE_SUFFIX = "_scale_inv"
# Scales of activations, for engines that multiply in FP8.
UNUSED_SUFFIXES = (".input_scale", ".activation_scale")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
BF16_FIELDS = 0x87F0 - 0x10000  # the sign, the low four bits of the exponent, the high three of the mantissa
NAN_AS_NUMBER = 480.0  # what the code of NaN would be; the largest number is 448
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def fp8_tensors(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """settings: the config's `quantization_config`. Without a `weight_block_size` one scale serves a whole weight.

    Raises:
        CheckpointError: a weight has no scales, or scales that do not fit.
    """
    block = settings.get("weight_block_size")
    if block is not None and not _is_block(block):
        raise CheckpointError(f"quantization_config: weight_block_size {block!r} is not a pair of lengths.")
    recipes = [
        _recipe(stored, entry, tuple(block) if block else entry.shape[-2:])
        for entry in stored.entries.values()
        if entry.dtype in FP8_DTYPES and not entry.name.endswith(SCALE_SUFFIX)
    ]
    return DequantizedTensors(stored, recipes, unused=[n for n in stored.entries if n.endswith(UNUSED_SUFFIXES)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """A weight and its scales; `block` is rows and columns that share one."""

    is_by_rows: ClassVar[bool] = True
    entry: TensorEntry
    scale: str
    block: tuple[int, int]

    @property
    def ingredients(self) -> tuple[str, ...]:
        return (self.entry.name, self.scale)

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """bf16. Raises: CheckpointError when a weight or scale is not a finite number."""
        weight = stored.read_rows(self.entry.name, start, stop)
        values = torch.empty(weight.shape, dtype=torch.bfloat16)
        if weight.dim() == 2:
            scale = stored.read(self.scale).reshape(-1, -(-weight.shape[1] // self.block[1]))
            _dequantize(weight, scale.float(), self.block, start, values)
        else:
            scales = stored.read_rows(self.scale, start, stop).float()
            for matrix, scale, target in zip(weight, scales, values, strict=True):
                _dequantize(matrix, scale, self.block, 0, target)
        if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():  # a finite sum is the quick proof
            raise CheckpointError(f"{self.entry.path}: tensor {self.entry.name} has NaN or infinite weights.")
        return values


def _dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], first: int, out: Tensor) -> None:
    """``weight [R, C]``, the rows from `first` on, into `out`; one row of blocks at a time, as caches are small."""
    height, width = block
    full, rest = divmod(weight.shape[1], width)
    row = 0
    while row < weight.shape[0]:
        blocks = (first + row) // height
        end = min(weight.shape[0], (blocks + 1) * height - first)
        values = fp8_values(weight[row:end])
        if full:
            values[:, : full * width].unflatten(1, (full, width)).mul_(scale[blocks, :full, None])
        if rest:
            values[:, full * width :].mul_(scale[blocks, full])
        out[row:end] = values
        row = end


def fp8_values(weight: Tensor) -> Tensor:
    """fp32, exact. Four times as fast as torch's own conversion of float8_e4m3fn on the CPU."""
    if weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    # Sign, exponent and mantissa are moved to their places in bf16, whose exponent counts from 2^120 further down.
    bits = weight.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(BF16_FIELDS)
    values = bits.view(torch.bfloat16).float().mul_(2.0**120)
    if values.numel() and max(-values.min().item(), values.max().item()) == NAN_AS_NUMBER:
        values[values.abs() == NAN_AS_NUMBER] = torch.nan
    return values


def _recipe(stored: TensorSource, entry: TensorEntry, block: tuple[int, ...]) -> Fp8Weight:
    name = entry.name + SCALE_SUFFIX
    scale = stored.entries.get(name)
    if scale is None:
        raise CheckpointError(f"{entry.path}: tensor {entry.name} is {entry.dtype} without scales: {name} is missing.")
    if len(entry.shape) not in (2, 3) or 0 in entry.shape:
        raise CheckpointError(f"{entry.path}: tensor {entry.name} is FP8 {list(entry.shape)}, expected a matrix.")
    grid = tuple(-(-size // length) for size, length in zip(entry.shape[-2:], block, strict=True))
    expected = (*entry.shape[:-2], *grid)
    is_single = len(entry.shape) == 2 and expected == (1, 1) and scale.shape in ((), (1,))
    if (scale.shape != expected and not is_single) or scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.path}: tensor {name} is {scale.dtype} {list(scale.shape)}, expected one scale per block of "
            f"{list(block)}: {list(expected)}."
        )
    virtual = replace(entry, dtype=torch.bfloat16)
    return Fp8Weight(entry=virtual, scale=name, block=(block[0], block[1]))


def _is_block(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(length) is int and length > 0 for length in block)
