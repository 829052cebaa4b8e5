"""Integer weights packed into int32 words: compressed-tensors' pack-quantized, GPTQ and AWQ.

All stand for ``weight [O, K] = (code - zero) * scale`` with a scale, and perhaps a zero, per group of inputs. Words
hold their codes from the lowest bits up. Values are in the dtype of the scales.

Source: compressed-tensors, compressors/pack_quantized; AutoGPTQ, nn_modules/qlinear; AutoAWQ, utils/packing_utils.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.tensors import TensorSource
from offload_moe.errors import CheckpointError

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTORS = ("_shape", "g_idx")
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where each output's code is in a word


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedWeight:
    """compressed-tensors: ``_packed [O, K/8]``, ``_scale [O, G]``, ``_shape [2]``; zero is the middle code."""

    is_by_rows: ClassVar[bool] = True
    entry: TensorEntry
    bits: int

    @property
    def ingredients(self) -> tuple[str, ...]:
        return tuple(f"{self.entry.name}_{part}" for part in ("packed", "scale", "shape"))

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Raises: CheckpointError when a scale is not a finite number, or the shape is another."""
        packed, scale, shape = self.ingredients
        if stored.read(shape).tolist() != list(self.entry.shape):
            raise CheckpointError(f"{self.entry.path}: tensor {shape} is not {list(self.entry.shape)}, the codes are.")
        codes = unpack(stored.read_rows(packed, start, stop), self.bits).float() - (1 << (self.bits - 1))
        scales = stored.read_rows(scale, start, stop).float()
        values = codes.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]
        return _finite(self.entry, values.flatten(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqWeight:
    """GPTQ: ``qweight [K/8, O]``, ``qzeros [G, O/8]``, ``scales [G, O]``, ``g_idx [K]``: the group of each input.

    zero_offset: what is added to a stored zero.
    """

    is_by_rows: ClassVar[bool] = False
    entry: TensorEntry
    bits: int
    zero_offset: int

    @property
    def ingredients(self) -> tuple[str, ...]:
        return _q_names(self.entry.name.removesuffix("weight"), "qweight", "qzeros", "scales", "g_idx")

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Raises: CheckpointError when a scale is not a finite number, or a group does not exist."""
        words, zero_words, scales, groups = (stored.read(name) for name in self.ingredients)
        if groups.numel() and not 0 <= groups.min() <= groups.max() < len(scales):
            raise CheckpointError(f"{self.entry.path}: tensor {self.ingredients[3]} names groups that are not there.")
        codes = unpack(words.T[start:stop], self.bits).int()
        zeros = (unpack(zero_words, self.bits).int() + self.zero_offset) & ((1 << self.bits) - 1)
        per_input = groups.long()
        values = (codes - zeros.T[start:stop, per_input]).float() * scales.float().T[start:stop, per_input]
        return _finite(self.entry, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqWeight:
    """AWQ in its GEMM layout, 4 bits: ``qweight [K, O/8]``, ``qzeros [G, O/8]``, ``scales [G, O]``."""

    is_by_rows: ClassVar[bool] = False
    entry: TensorEntry

    @property
    def ingredients(self) -> tuple[str, ...]:
        return _q_names(self.entry.name.removesuffix("weight"), "qweight", "qzeros", "scales")

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Raises: CheckpointError when a scale is not a finite number."""
        words, zero_words, scales = (stored.read(name) for name in self.ingredients)
        codes, zeros = (
            unpack(part, 4).unflatten(1, (-1, len(AWQ_ORDER)))[..., AWQ_ORDER].flatten(1).float()
            for part in (words, zero_words)
        )
        values = (codes.unflatten(0, (len(scales), -1)) - zeros[:, None]) * scales.float()[:, None]  # [G, K/G, O]
        return _finite(self.entry, values.flatten(0, 1).T[start:stop])


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 ``[R, C]`` -> uint8 ``[R, C * 32 / bits]``."""
    numbers = words.contiguous().view(torch.uint8)
    return numbers if bits == 8 else torch.stack([numbers & 15, numbers >> 4], dim=-1).flatten(1)


def compressed_weight(stored: TensorSource, name: str, bits: int) -> CompressedWeight:
    """The weight `name`. Raises: CheckpointError when a part is missing or they do not fit together."""
    parts = _parts(stored, tuple(f"{name}_{part}" for part in ("packed", "scale", "shape")))
    packed, scale = (parts[f"{name}_{part}"] for part in ("packed", "scale"))
    (rows, words), (scale_rows, groups) = packed.shape, scale.shape
    columns = words * 32 // bits
    _check(parts, scale, rows == scale_rows and bool(groups) and columns % groups == 0)
    return CompressedWeight(entry=_entry(name, packed, scale, (rows, columns)), bits=bits)


def gptq_weight(stored: TensorSource, prefix: str, bits: int, zero_offset: int) -> GptqWeight:
    """The weight ``prefix + "weight"``. Raises: as `compressed_weight`."""
    names = _q_names(prefix, "qweight", "qzeros", "scales", "g_idx")
    parts = _parts(stored, names)
    words, zeros, scales, groups = (parts[name] for name in names)
    columns, rows = words.shape[0] * 32 // bits, words.shape[1]
    fits = zeros.shape == (scales.shape[0], rows * bits // 32) and rows * bits % 32 == 0 and scales.shape[1] == rows
    _check(parts, scales, fits and groups.shape == (columns,) and groups.dtype == zeros.dtype == torch.int32)
    entry = _entry(f"{prefix}weight", words, scales, (rows, columns))
    return GptqWeight(entry=entry, bits=bits, zero_offset=zero_offset)


def awq_weight(stored: TensorSource, prefix: str) -> AwqWeight:
    """The weight ``prefix + "weight"``. Raises: as `compressed_weight`."""
    names = _q_names(prefix, "qweight", "qzeros", "scales")
    parts = _parts(stored, names)
    words, zeros, scales = (parts[name] for name in names)
    columns, rows = words.shape[0], words.shape[1] * 8
    num_groups = scales.shape[0]
    fits = zeros.shape == (num_groups, words.shape[1]) and scales.shape[1] == rows and zeros.dtype == torch.int32
    _check(parts, scales, fits and num_groups > 0 and columns % num_groups == 0)
    return AwqWeight(entry=_entry(f"{prefix}weight", words, scales, (rows, columns)))


def _q_names(prefix: str, *parts: str) -> tuple[str, ...]:
    return tuple(prefix + part for part in parts)


def _parts(stored: TensorSource, names: tuple[str, ...]) -> dict[str, TensorEntry]:
    """Entries by name; the first is the one with the codes."""
    first = stored.entries[names[0]]
    for name in names:
        if name not in stored.entries:
            raise CheckpointError(f"{first.path}: tensor {first.name} is packed, but {name} is missing.")
        entry = stored.entries[name]
        if len(entry.shape) != (1 if name.endswith(VECTORS) else 2):
            raise CheckpointError(f"{entry.path}: tensor {name} is {list(entry.shape)}, which belongs to no matrix.")
    return {name: stored.entries[name] for name in names}


def _check(parts: Mapping[str, TensorEntry], scales: TensorEntry, fits: bool) -> None:
    words = next(iter(parts.values()))
    if not fits or words.dtype != torch.int32 or scales.dtype not in SCALE_DTYPES or 0 in words.shape:
        found = ", ".join(f"{name} {entry.dtype} {list(entry.shape)}" for name, entry in parts.items())
        raise CheckpointError(f"{words.path}: the parts of a packed weight do not fit together: {found}.")


def _entry(name: str, words: TensorEntry, scales: TensorEntry, shape: tuple[int, int]) -> TensorEntry:
    return TensorEntry(name=name, path=words.path, dtype=scales.dtype, shape=shape, offset=words.offset)


def _finite(entry: TensorEntry, values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{entry.path}: tensor {entry.name} has NaN or infinite weights.")
    return values.to(entry.dtype)
