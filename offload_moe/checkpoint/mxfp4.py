"""MXFP4 experts of gpt-oss: ``NAME_blocks`` uint8 ``[E, R, G, 16]`` and ``NAME_scales`` uint8 ``[E, R, G]``.

They represent ``NAME [E, 32 G, R]`` in bf16, because transformers' module has matrices as ``[in, out]``.

Source: transformers/integrations/mxfp4.py, `convert_moe_packed_tensors`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.packed import ADVICE, DAMAGED
from offload_moe.checkpoint.tensors import DequantizedTensors, TensorSource
from offload_moe.errors import CheckpointError
from offload_moe.quant.mxfp4 import BLOCK, NOT_A_NUMBER, mxfp4_values

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_BYTES = BLOCK // 2
BYTES = (torch.uint8, torch.float8_e8m0fnu)
ROWS = 64


class Mxfp4Tensors(DequantizedTensors):
    """A checkpoint whose fused experts are MXFP4."""

    recipes: dict[str, "Mxfp4Weight"]  # type: ignore[assignment]

    def __init__(self, stored: TensorSource, settings: dict[str, Any]) -> None:
        """Raises: CheckpointError when blocks have no scales, or scales that do not fit."""
        blocks = [e for e in stored.entries.values() if e.name.endswith(BLOCKS) and e.dtype == torch.uint8]
        super().__init__(stored, [_recipe(stored, entry) for entry in blocks])

    def read_packed(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """One expert's stored codes ``[R, 16 G]`` and scales ``[R, G]``."""
        recipe = self.recipes[name]
        blocks, scales = (self.stored.read_rows(part, expert, expert + 1)[0] for part in recipe.ingredients)
        return blocks.flatten(1), scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Weight:
    """A fused weight, with its blocks and scales."""

    is_by_rows: ClassVar[bool] = True
    entry: TensorEntry

    @property
    def ingredients(self) -> tuple[str, ...]:
        return (self.entry.name + BLOCKS, self.entry.name + SCALES)

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """bf16 ``[stop - start, 32 G, R]``. Raises: CheckpointError for a scale that is no number."""
        values = torch.empty(stop - start, *self.entry.shape[1:], dtype=torch.bfloat16)
        for expert in range(start, stop):
            blocks, scales = (stored.read_rows(part, expert, expert + 1)[0] for part in self.ingredients)
            if (scales == NOT_A_NUMBER).any():
                raise CheckpointError(
                    f"{self.entry.path}: tensor {self.entry.name}{SCALES} has NaN scales (MXFP4). {DAMAGED}"
                )
            for row in range(0, len(scales), ROWS):  # the working set fits into a cache
                rows = slice(row, row + ROWS)
                values[expert - start, :, rows] = mxfp4_values(blocks[rows].flatten(1), scales[rows]).T
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """One matrix in MXFP4: codes in bytes ``[R, C/2]``, scales in bytes ``[R, C/32]``, for ``[R, C]`` in bf16.

    compressed-tensors' mxfp4-pack-quantized, and the experts of DeepSeek-V4.
    """

    is_by_rows: ClassVar[bool] = True
    entry: TensorEntry
    ingredients: tuple[str, ...]

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """bf16. Raises: CheckpointError for a scale that is no number."""
        codes, scales = (stored.read_rows(name, start, stop).view(torch.uint8) for name in self.ingredients)
        if (scales == NOT_A_NUMBER).any():
            raise CheckpointError(f"{self.entry.path}: tensor {self.ingredients[1]} has NaN scales (MXFP4). {DAMAGED}")
        return mxfp4_values(codes, scales).to(torch.bfloat16)


def packed_rows(stored: TensorSource, codes_name: str, scales_name: str, name: str) -> PackedRows:
    """The weight `name`. Raises: CheckpointError when its scales are missing, or are not one byte per 32 weights."""
    codes, scales = stored.entries[codes_name], stored.entries.get(scales_name)
    found = "no such tensor" if scales is None else f"{scales.dtype} {list(scales.shape)}"
    expected = (*codes.shape[:-1], codes.shape[-1] // BLOCK_BYTES) if len(codes.shape) == 2 else ()
    if scales is None or not expected or scales.dtype not in BYTES or scales.shape != expected or 0 in expected:
        raise CheckpointError(
            f"{codes.path}: tensor {codes_name} is {codes.dtype} {list(codes.shape)}, which can be read as MXFP4 with "
            f"one byte per 32 weights in {scales_name}; that is {found}. {ADVICE}"
        )
    shape = (codes.shape[0], codes.shape[1] * 2)
    return PackedRows(
        entry=TensorEntry(name=name, path=codes.path, dtype=torch.bfloat16, shape=shape, offset=codes.offset),
        ingredients=(codes_name, scales_name),
    )


def _recipe(stored: TensorSource, blocks: TensorEntry) -> Mxfp4Weight:
    name = blocks.name.removesuffix(BLOCKS)
    scales = stored.entries.get(name + SCALES)
    if scales is None:
        raise CheckpointError(
            f"{blocks.path}: tensor {blocks.name} has no scales (MXFP4): {name + SCALES} is missing. {DAMAGED}"
        )
    if len(blocks.shape) != 4 or blocks.shape[3] != BLOCK_BYTES or 0 in blocks.shape:
        raise CheckpointError(
            f"{blocks.path}: tensor {blocks.name} (MXFP4) is {list(blocks.shape)}, expected "
            f"[experts, rows, groups, 16]. {DAMAGED}"
        )
    if scales.shape != blocks.shape[:3] or scales.dtype != torch.uint8:
        raise CheckpointError(
            f"{scales.path}: tensor {scales.name} is {scales.dtype} {list(scales.shape)}, expected one byte per group: "
            f"{list(blocks.shape[:3])} (MXFP4). {DAMAGED}"
        )
    experts, rows, groups, _ = blocks.shape
    shape = (experts, groups * BLOCK, rows)
    return Mxfp4Weight(
        entry=TensorEntry(name=name, path=blocks.path, dtype=torch.bfloat16, shape=shape, offset=blocks.offset)
    )
