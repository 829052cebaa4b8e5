"""MXFP4 experts, as gpt-oss has them: ``NAME_blocks`` uint8 ``[E, R, G, 16]`` and ``NAME_scales`` uint8 ``[E, R, G]``.

They stand for ``NAME [E, 32 G, R]`` in bf16: transformers' module keeps matrices as ``[in, out]``.

Source: transformers/integrations/mxfp4.py, `convert_moe_packed_tensors`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.tensors import DequantizedTensors, TensorSource
from offload_moe.errors import CheckpointError
from offload_moe.quant.mxfp4 import BLOCK, NOT_A_NUMBER, mxfp4_values

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_BYTES = BLOCK // 2
ROWS = 64


class Mxfp4Tensors(DequantizedTensors):
    """A checkpoint whose fused experts are MXFP4."""

    recipes: dict[str, "Mxfp4Weight"]  # type: ignore[assignment]

    def __init__(self, stored: TensorSource, settings: dict[str, Any]) -> None:
        """Raises: CheckpointError when blocks have no scales, or scales that do not fit."""
        blocks = [e for e in stored.entries.values() if e.name.endswith(BLOCKS) and e.dtype == torch.uint8]
        super().__init__(stored, [_recipe(stored, entry) for entry in blocks])

    def read_packed(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """One expert's codes ``[R, 16 G]`` and scales ``[R, G]``, as they are stored."""
        recipe = self.recipes[name]
        blocks, scales = (self.stored.read_rows(part, expert, expert + 1)[0] for part in recipe.ingredients)
        return blocks.flatten(1), scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Weight:
    """A fused weight and what it is stored as."""

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
                raise CheckpointError(f"{self.entry.path}: tensor {self.entry.name}{SCALES} has NaN scales.")
            for row in range(0, len(scales), ROWS):  # what is in work fits into a cache
                rows = slice(row, row + ROWS)
                values[expert - start, :, rows] = mxfp4_values(blocks[rows].flatten(1), scales[rows]).T
        return values


def _recipe(stored: TensorSource, blocks: TensorEntry) -> Mxfp4Weight:
    name = blocks.name.removesuffix(BLOCKS)
    scales = stored.entries.get(name + SCALES)
    if scales is None:
        raise CheckpointError(f"{blocks.path}: tensor {blocks.name} has no scales: {name + SCALES} is missing.")
    if len(blocks.shape) != 4 or blocks.shape[3] != BLOCK_BYTES or 0 in blocks.shape:
        raise CheckpointError(
            f"{blocks.path}: tensor {blocks.name} is {list(blocks.shape)}, expected [experts, rows, groups, 16]."
        )
    if scales.shape != blocks.shape[:3] or scales.dtype != torch.uint8:
        raise CheckpointError(
            f"{scales.path}: tensor {scales.name} is {scales.dtype} {list(scales.shape)}, expected one byte per group: "
            f"{list(blocks.shape[:3])}."
        )
    experts, rows, groups, _ = blocks.shape
    shape = (experts, groups * BLOCK, rows)
    return Mxfp4Weight(
        entry=TensorEntry(name=name, path=blocks.path, dtype=torch.bfloat16, shape=shape, offset=blocks.offset)
    )
