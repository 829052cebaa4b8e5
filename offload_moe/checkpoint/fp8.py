"""FP8 weights with one scale per block of rows and columns, per output channel, or per weight.

A weight ``[R, C]`` in float8_e4m3fn (or e5m2) has scales that are multiplied, whatever their name:
``weight_scale_inv [ceil(R/128), ceil(C/128)]`` (DeepSeek-V3, Kimi K2, MiniMax M2), ``weight_scale`` of one number or
``[R, 1]`` (AutoFP8, vLLM, ModelOpt, FBGEMM, compressed-tensors), ``scale`` (DeepSeek-V4). Values are bf16, as
transformers dequantizes them. Fused experts have a leading dimension.

Source: DeepSeek-V3's inference/kernel.py, `weight_dequant`; transformers/integrations, finegrained_fp8.py and
fbgemm_fp8.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from offload_moe.checkpoint.fp8_scales import SCALE_DTYPES, as_numbers, block_of, grid_of, is_scale, scale_name
from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.mxfp4 import packed_rows
from offload_moe.checkpoint.packed import ADVICE, DAMAGED
from offload_moe.checkpoint.tensors import DequantizedTensors, Recipe, TensorSource
from offload_moe.errors import CheckpointError

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
BF16_FIELDS = 0x87F0 - 0x10000  # the sign, the low four bits of the exponent, the high three of the mantissa
NAN_AS_NUMBER = 480.0  # the value of NaN's code; the largest number is 448
USUAL_BLOCK = (128, 128)  # the default of transformers, if the config has none
ROWS = 128  # the working set fits into a cache


def fp8_tensors(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """settings: the config's `quantization_config`.

    Raises:
        CheckpointError: a weight has no scales, or scales that do not fit.
    """
    block = settings.get("weight_block_size")
    if block is not None and not _is_block(block):
        raise CheckpointError(f"quantization_config: weight_block_size {block!r} is not a pair of lengths.")
    usual = None if "weight_block_size" in settings else USUAL_BLOCK
    return DequantizedTensors(stored, list(_recipes(stored, (block[0], block[1]) if block else None, usual=usual)))


def fbgemm(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """FBGEMM: one scale per output channel; fused experts are matrices ``[in, out]``. Raises: as `fp8_tensors`."""
    return DequantizedTensors(stored, list(_recipes(stored, None, is_turned=True)))


def modelopt(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """FP8 weights of NVIDIA's ModelOpt. Raises: CheckpointError for NVFP4 and its other formats."""
    nested = settings.get("quantization")
    settings = nested if isinstance(nested, dict) else settings
    nvfp4 = next((name for name in stored.entries if name.endswith("weight_scale_2")), None)
    algorithm = settings.get("quant_algo")
    if nvfp4 or not str(algorithm).startswith(("FP8", "MXFP8", "MIXED_PRECISION")):
        where = f": tensor {nvfp4} belongs to NVFP4" if nvfp4 else ""
        raise CheckpointError(
            f"The checkpoint is quantized with ModelOpt ({algorithm}){where}, of which FP8 can be read. {ADVICE}"
        )
    return DequantizedTensors(stored, list(_recipes(stored, None)))


def _recipes(
    stored: TensorSource,
    block: tuple[int, int] | None,
    *,
    is_turned: bool = False,
    usual: tuple[int, int] | None = None,
) -> Iterator[Recipe]:
    for entry in stored.entries.values():
        if is_scale(entry.name):
            continue
        if entry.dtype in FP8_DTYPES:
            yield fp8_weight(stored, entry, block, is_turned=is_turned, usual=usual)
        elif entry.dtype in (torch.int8, torch.uint8) and entry.name.endswith(".weight"):
            yield packed_rows(stored, entry.name, scale_name(stored, entry.name), entry.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """A weight and its scales. block: rows and columns that share a scale; grid: number of blocks along each."""

    is_by_rows: ClassVar[bool] = True
    entry: TensorEntry
    scale: str
    block: tuple[int, int]
    grid: tuple[int, int]

    @property
    def ingredients(self) -> tuple[str, ...]:
        return (self.entry.name, self.scale)

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """bf16. Raises: CheckpointError when a weight or scale is not a finite number."""
        weight = stored.read_rows(self.entry.name, start, stop)
        values = torch.empty(weight.shape, dtype=torch.bfloat16)
        if weight.dim() == 2:
            _dequantize(weight, as_numbers(stored.read(self.scale)).reshape(self.grid), self.block, start, values)
        else:
            for matrix, scale, target in zip(weight, self._scales(stored, start, stop), values, strict=True):
                _dequantize(matrix, scale, self.block, 0, target)
        if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():  # a finite sum proves it quickly
            raise CheckpointError(f"{self.entry.path}: tensor {self.entry.name} has NaN or infinite weights. {DAMAGED}")
        return values

    def _scales(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Scales ``[stop - start, *grid]`` of fused experts, which may all share one number."""
        if math.prod(stored.entries[self.scale].shape) == 1:
            return as_numbers(stored.read(self.scale)).reshape(1, 1, 1).expand(stop - start, 1, 1)
        return as_numbers(stored.read_rows(self.scale, start, stop)).reshape(-1, *self.grid)


def _dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], first: int, out: Tensor) -> None:
    """``weight [R, C]``, the rows from `first` on, into `out`; a few rows at a time, to stay in the caches."""
    height, width = block
    full, rest = divmod(weight.shape[1], width)
    for row in range(0, weight.shape[0], ROWS):
        values = fp8_values(weight[row : row + ROWS])
        scales = scale[(first + row + torch.arange(len(values))) // height]
        if full:
            values[:, : full * width].unflatten(1, (full, width)).mul_(scales[:, :full, None])
        if rest:
            values[:, full * width :].mul_(scales[:, full:])
        out[row : row + ROWS] = values


def fp8_values(weight: Tensor) -> Tensor:
    """Exact conversion to fp32. Four times as fast as torch's own conversion of float8_e4m3fn on the CPU."""
    if weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    # Sign, exponent and mantissa are moved to their places in bf16, whose exponent bias differs by 120.
    bits = weight.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(BF16_FIELDS)
    values = bits.view(torch.bfloat16).float().mul_(2.0**120)
    if values.numel() and max(-values.min().item(), values.max().item()) == NAN_AS_NUMBER:
        values[values.abs() == NAN_AS_NUMBER] = torch.nan
    return values


def fp8_weight(
    stored: TensorSource,
    entry: TensorEntry,
    block: tuple[int, int] | None,
    *,
    is_turned: bool = False,
    usual: tuple[int, int] | None = None,
) -> Fp8Weight:
    """block: rows and columns of a block if the config has them; else one scale per weight or per channel.

    is_turned: fused experts are ``[in, out]``, so that a channel is a column. usual: a block to try where `block` is
    not known and the scales are for nothing else.

    Raises: CheckpointError when there are no scales, or they do not fit.
    """
    name = scale_name(stored, entry.name)
    scale = stored.entries.get(name)
    if scale is None:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name} is {entry.dtype} without scales: {name} is missing. {ADVICE}"
        )
    if len(entry.shape) not in (2, 3) or 0 in entry.shape:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name} is FP8 {list(entry.shape)}, expected a matrix. {ADVICE}"
        )
    found = block_of(entry.shape, scale, block, is_turned)
    if found is None and usual is not None:
        found = block_of(entry.shape, scale, usual, is_turned)
    if found is None or scale.dtype not in SCALE_DTYPES:
        expected = (
            f"one scale per block of {list(block)}: {[*entry.shape[:-2], *grid_of(entry.shape, block)]}"
            if block
            else f"one scale for the FP8 weight {list(entry.shape)} or for each of its rows"
        )
        raise CheckpointError(
            f"{scale.path}: tensor {name} is {scale.dtype} {list(scale.shape)}, expected {expected}. {ADVICE}"
        )
    return Fp8Weight(
        entry=replace(entry, dtype=torch.bfloat16), scale=name, block=found, grid=grid_of(entry.shape, found)
    )


def _is_block(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(length) is int and length > 0 for length in block)
