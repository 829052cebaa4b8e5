"""The scales of an FP8 weight: their names, and the rows and columns that share one."""

import math

import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.tensors import TensorSource

# Appended to the name of the weight; in place of its last part.
SCALE_SUFFIXES = ("_scale_inv", "_scale", "_weight_scale")
SCALE_NAMES = (".scale", ".qscale_weight")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
POWERS_OF_TWO = (torch.float8_e8m0fnu, torch.uint8)  # the same bits
MX_BLOCK = (1, 32)


def block_of(
    shape: tuple[int, ...], scale: TensorEntry, block: tuple[int, int] | None, is_turned: bool
) -> tuple[int, int] | None:
    """Rows and columns that share a scale, from the shape of the scales; None if no layout fits."""
    *experts, num_rows, num_columns = shape
    whole, per_row, per_column = (num_rows, num_columns), (1, num_columns), (num_rows, 1)
    if block and scale.shape == (*experts, *grid_of(shape, block)):
        return block
    if scale.dtype in POWERS_OF_TWO and scale.shape == (*experts, *grid_of(shape, MX_BLOCK)):
        return MX_BLOCK
    if block and grid_of(shape, block) != (1, 1):
        return None
    if math.prod(scale.shape) == 1 or (experts and scale.shape in _with_ones(experts)):
        return whole
    if experts and scale.shape == (*experts, 1, num_columns):
        return per_column
    if experts and is_turned:
        return per_column if scale.shape == (*experts, num_columns, 1) else None
    return per_row if scale.shape in ((*experts, num_rows, 1), (*experts, num_rows)) else None


def _with_ones(experts: list[int]) -> tuple[tuple[int, ...], ...]:
    return (*experts,), (*experts, 1), (*experts, 1, 1)


def grid_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks of a matrix, or of each of several, along rows and columns."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def is_scale(name: str) -> bool:
    return name.endswith((*SCALE_SUFFIXES, *SCALE_NAMES))


def scale_name(stored: TensorSource, name: str) -> str:
    """The name of a weight's scales; the usual one if there are none."""
    candidates = [f"{name}{suffix}" for suffix in SCALE_SUFFIXES]
    candidates += [f"{name.removesuffix('.weight')}{last}" for last in SCALE_NAMES]
    return next((candidate for candidate in candidates if candidate in stored.entries), candidates[0])


def as_numbers(scale: Tensor) -> Tensor:
    """fp32."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
