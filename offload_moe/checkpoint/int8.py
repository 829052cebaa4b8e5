"""Weights in whole bytes, int8 ``[O, K]``: compressed-tensors' int-quantized and bitsandbytes' LLM.int8.

Source: compressed-tensors, compressors/naive_quantized; bitsandbytes, functional.py, `int8_vectorwise_dequant`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.packed import DAMAGED, SCALE_DTYPES, finite, made_of
from offload_moe.checkpoint.tensors import TensorSource
from offload_moe.errors import CheckpointError

INVERSE_127 = 7.874015718698502e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """``(weight - zero) * weight_scale``; a scale per weight, per output ``[O]``, or per group of inputs ``[O, G]``."""

    is_by_rows: ClassVar[bool] = True
    entry: TensorEntry
    ingredients: tuple[str, ...]
    num_groups: int

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Raises: CheckpointError when a scale is not a finite number."""
        codes, scales, *zeros = self.ingredients
        values = stored.read_rows(codes, start, stop).float().unflatten(1, (self.num_groups, -1))
        if zeros:
            values -= self._per_group(stored, zeros[0], start, stop)
        values *= self._per_group(stored, scales, start, stop)
        return finite(self.entry, values.flatten(1))

    def _per_group(self, stored: TensorSource, name: str, start: int, stop: int) -> Tensor:
        """Scales or zeros ``[rows, G, 1]``, or ``[1, 1, 1]`` for the whole weight."""
        whole = stored.read(name).float().reshape(-1, self.num_groups, 1)
        return whole if len(whole) == 1 else whole[start:stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmInt8Weight:
    """``weight * SCB / 127`` with an ``SCB [O]`` beside it, in fp16 as LLM.int8 computes."""

    is_by_rows: ClassVar[bool] = True
    entry: TensorEntry
    ingredients: tuple[str, ...]

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Raises: CheckpointError when a scale is not a finite number."""
        codes = stored.read_rows(self.ingredients[0], start, stop).float()
        scales = stored.read(self.ingredients[1]).float().reshape(-1, 1)[start:stop]
        return finite(self.entry, codes * scales * INVERSE_127)


def int8_weight(stored: TensorSource, name: str) -> Int8Weight:
    """The weight `name`. Raises: CheckpointError when its scales are missing or do not fit."""
    codes, scales, zeros = stored.entries[name], _beside(stored, name, f"{name}_scale"), f"{name}_zero_point"
    num_groups = _num_groups(codes, scales)
    if scales.dtype not in SCALE_DTYPES or not num_groups:
        raise _misfit(codes, scales)
    if zeros in stored.entries and stored.entries[zeros].shape != scales.shape:
        raise _misfit(codes, stored.entries[zeros])
    parts = (name, scales.name, *((zeros,) if zeros in stored.entries else ()))
    return Int8Weight(entry=made_of(name, codes, scales, codes.shape), ingredients=parts, num_groups=num_groups)


def llm_int8_weight(stored: TensorSource, scales_name: str) -> LlmInt8Weight:
    """The weight of an ``SCB`` tensor. Raises: CheckpointError when the parts do not fit, or are tiled."""
    prefix = scales_name.removesuffix("SCB")
    scales = stored.entries[scales_name]
    codes = _beside(stored, scales_name, f"{prefix}weight")
    if (
        codes.dtype != torch.int8
        or len(codes.shape) != 2
        or scales.shape not in ((codes.shape[0],), (codes.shape[0], 1))
    ):
        raise _misfit(codes, scales)
    layout = f"{prefix}weight_format"
    if layout in stored.entries and stored.read(layout).flatten().tolist() != [0]:
        raise CheckpointError(
            f"{codes.path}: tensor {codes.name} is in a tiled layout of LLM.int8 ({layout} is not 0), which cannot be "
            "read. Use a version of the model in bf16 or 4 bits."
        )
    parts = (codes.name, scales_name, *((layout,) if layout in stored.entries else ()))
    return LlmInt8Weight(entry=replace(codes, dtype=torch.float16), ingredients=parts)


def _num_groups(codes: TensorEntry, scales: TensorEntry) -> int:
    """Number of scales per row; 0 if they do not fit."""
    if len(codes.shape) != 2 or 0 in codes.shape:
        return 0
    if scales.shape in ((), (1,), (1, 1), codes.shape[:1]):
        return 1
    fits = len(scales.shape) == 2 and scales.shape[0] == codes.shape[0] and scales.shape[1] > 0
    return scales.shape[1] if fits and codes.shape[1] % scales.shape[1] == 0 else 0


def _beside(stored: TensorSource, name: str, other: str) -> TensorEntry:
    if other not in stored.entries:
        raise CheckpointError(f"{stored.entries[name].path}: tensor {name} is int8, but {other} is missing. {DAMAGED}")
    return stored.entries[other]


def _misfit(codes: TensorEntry, scales: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{scales.path}: tensor {scales.name} is {scales.dtype} {list(scales.shape)}, which does not fit the "
        f"int8 weight {codes.name} {list(codes.shape)}. {DAMAGED}"
    )
