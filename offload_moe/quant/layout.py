"""The matrices and biases of one expert, and their places in its record.

Shape legend: E experts, H hidden, I intermediate, O out features, K in features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64  # weights of a row that share a scale, in our own codecs
PLANE_ALIGNMENT = 256  # bitsandbytes' CUDA kernels read planes with vector loads
GATED = "gate_up_proj"  # the first matrix of an expert with a gate; any other name has none
RECORD_ALIGNMENT = 4096  # O_DIRECT and page-locked transfers need no bounce buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One weight matrix, ``[out_features, in_features]`` independent of the module's layout."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """One routed expert, in the order its matrices are used.

    `matrices` and `biases` carry the parameter names of the experts module (`gate_up_proj`, `down_proj_bias`).
    `is_transposed`: the module keeps matrices as ``[in, out]``.
    `is_interleaved`: the rows of the first matrix alternate gate, up, gate, up.
    """

    matrices: tuple[Matrix, ...]
    biases: tuple[tuple[str, int], ...] = ()
    is_transposed: bool = False
    is_interleaved: bool = False

    @property
    def num_weights(self) -> int:
        return sum(m.out_features * m.in_features for m in self.matrices)

    @property
    def has_gate(self) -> bool:
        """Whether the rows of the first matrix are gate rows and then as many up rows, in the kernels' layout."""
        return self.matrices[0].name == GATED

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of one expert's tensor as the experts module keeps it."""
        shapes: dict[str, tuple[int, ...]] = {}
        for m in self.matrices:
            pair = (m.out_features, m.in_features)
            shapes[m.name] = pair[::-1] if self.is_transposed else pair
        return shapes | {name: (length,) for name, length in self.biases}

    def to_kernel_rows(self, name: str, value: Tensor) -> Tensor:
        """A parameter in the kernels' layout: ``[out, in]``, gate rows before up rows."""
        rows = value.T if self.is_transposed and value.dim() == 2 else value
        return self.gate_before_up(name, rows).contiguous()

    def gate_before_up(self, name: str, rows: Tensor) -> Tensor:
        """Rows ``[out, ...]`` of a parameter in the kernels' order, whatever their dtype."""
        if self.is_interleaved and self._is_gate_up(name):
            return torch.cat([rows[0::2], rows[1::2]])
        return rows

    def to_module_layout(self, name: str, rows: Tensor) -> Tensor:
        """The inverse of `to_kernel_rows`."""
        if self.is_interleaved and self._is_gate_up(name):
            rows = torch.stack(rows.chunk(2), dim=1).flatten(0, 1)
        return rows.T.contiguous() if self.is_transposed and rows.dim() == 2 else rows

    def _is_gate_up(self, name: str) -> bool:
        return name.removesuffix("_bias") == self.matrices[0].name


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """A typed array inside a record."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """The places of one expert's planes in its contiguous record."""

    planes: Mapping[str, Plane]
    num_bytes: int

    @property
    def record_bytes(self) -> int:
        """Bytes of the record on disk and in a slot, padded so that the next one is aligned too."""
        return round_up(self.num_bytes, RECORD_ALIGNMENT)

    def view(self, record: Tensor, plane: str) -> Tensor:
        """The plane of a uint8 record as a typed tensor sharing its memory."""
        p = self.planes[plane]
        return record[p.offset : p.offset + p.num_bytes].view(p.dtype).view(p.shape)


def pack_planes(planes: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> RecordLayout:
    """Lay planes one after another, each on its alignment."""
    placed: dict[str, Plane] = {}
    offset = 0
    for name, dtype, shape in planes:
        offset = round_up(offset, PLANE_ALIGNMENT)
        placed[name] = Plane(offset=offset, dtype=dtype, shape=shape)
        offset += placed[name].num_bytes
    return RecordLayout(planes=placed, num_bytes=offset)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def weight_shape(out_features: int, in_features: int) -> ExpertShape:
    """The record shape of one linear layer without its bias."""
    return ExpertShape(matrices=(Matrix(name="weight", out_features=out_features, in_features=in_features),))
