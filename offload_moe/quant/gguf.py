"""The types of GGUF files as codecs: a record has the bytes of a file, and nothing is quantized anew.

A codec is named after the types of a record's matrices, such as `gguf:Q4_K,Q4_K,Q6_K` of an expert's gate, up and down.

Source: ggml-common.h of llama.cpp; gguf-py, gguf/quants.py, which decodes them here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.quant.layout import ExpertShape, Matrix, RecordLayout, pack_planes

GGUF = "gguf"  # of a store, whose records have types of their own
PREFIX = f"{GGUF}:"
MOST_TYPES = 3  # an expert's gate, up and down


@dataclass(frozen=True, slots=True)
class GgufType:
    """One type. columns, num_bytes: of what a row of a panel is made of, 64 or 256 weights; num_dwords: the part of it
    that is interleaved, see docs/decisions/120. Plain numbers, of which a dword has one or two, stay in row order."""

    name: str
    columns: int
    num_bytes: int
    num_dwords: int

    @property
    def is_plain(self) -> bool:
        """Whether its weights are numbers, which take activations in fp32."""
        return self.num_bytes == 4

    def takes(self, in_features: int) -> bool:
        """Whether a kernel reads rows of so many weights."""
        return in_features % self.columns == 0

    def row_bytes(self, in_features: int) -> int:
        """Bytes of a row. Raises: ConfigError for a row that no kernel reads."""
        if not self.takes(in_features):
            raise ConfigError(f"rows of {in_features} weights in {self.name}, which are no multiple of {self.columns}")
        return in_features // self.columns * self.num_bytes


TYPES: Mapping[str, GgufType] = {
    kind.name: kind
    for kind in (
        GgufType("Q4_0", 64, 36, 9),
        GgufType("Q4_1", 64, 40, 10),
        GgufType("Q5_0", 64, 44, 11),
        GgufType("Q5_1", 64, 48, 12),
        GgufType("Q8_0", 64, 68, 17),
        GgufType("IQ4_NL", 64, 36, 9),
        GgufType("MXFP4", 64, 34, 8),
        GgufType("Q2_K", 256, 84, 21),
        GgufType("Q3_K", 256, 110, 27),
        GgufType("Q4_K", 256, 144, 36),
        GgufType("Q5_K", 256, 176, 44),
        GgufType("Q6_K", 256, 210, 52),
        GgufType("IQ4_XS", 256, 136, 34),
        GgufType("F16", 2, 4, 1),
        GgufType("BF16", 2, 4, 1),
        GgufType("F32", 1, 4, 1),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPart:
    """A matrix of one type in a record: a whole matrix, or the gate or up rows of the first one.

    plane: its name in the layout. first_row: its first row in the matrix.
    """

    matrix: Matrix
    plane: str
    kind: GgufType
    first_row: int
    num_rows: int

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.kind.row_bytes(self.matrix.in_features)

    @property
    def sides_offset(self) -> int:
        """Where in the plane of a record in panels the bytes begin that fill no dword."""
        return self.num_rows * (self.matrix.in_features // self.kind.columns) * self.kind.num_dwords * 4


class GgufCodec:
    """Records of matrices as they lie in a GGUF file, and biases in fp32."""

    def __init__(self, kinds: Sequence[str]) -> None:
        """kinds: names of `TYPES`, one for each part. Raises: ConfigError."""
        if unknown := [kind for kind in kinds if kind not in TYPES]:
            raise ConfigError(f"GGUF's type {unknown[0]} has no kernel. Those that have: {', '.join(TYPES)}.")
        if not 0 < len(kinds) <= MOST_TYPES:
            raise ConfigError(f"{len(kinds)} types of GGUF for one record.")
        self.kinds = tuple(TYPES[kind] for kind in kinds)
        self.name = PREFIX + ",".join(kinds)

    def parts(self, shape: ExpertShape) -> tuple[GgufPart, ...]:
        """The matrices of a record in its order. Raises: ConfigError for a shape of other parts."""
        return _parts(self.name, shape)

    def layout(self, shape: ExpertShape) -> RecordLayout:
        return _layout(self.name, shape)

    def encode(self, shape: ExpertShape, tensors: Mapping[str, Tensor]) -> Tensor:
        """The record of bytes as they are. tensors: uint8 ``[rows, row_bytes]`` by a part's plane; biases by name."""
        layout = self.layout(shape)
        record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
        for plane in layout.planes:
            value = tensors[plane.removesuffix(".values")]
            layout.view(record, plane).copy_(value.reshape(-1))
        return record

    def decode(self, shape: ExpertShape, record: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """As `Codec.decode`; record: in rows."""
        layout = self.layout(shape)
        tensors = {
            matrix.name: shape.to_module_layout(matrix.name, self.matrix(shape, record, matrix.name).to(dtype))
            for matrix in shape.matrices
        }
        for name, _ in shape.biases:
            tensors[name] = shape.to_module_layout(name, layout.view(record, f"{name}.values").to(dtype))
        return tensors

    def matrix(self, shape: ExpertShape, record: Tensor, name: str) -> Tensor:
        """The matrix of that name of a record in rows: fp32 ``[O, K]``, gate rows before up rows."""
        layout = self.layout(shape)
        return torch.cat(
            [
                decode_rows(part.kind, layout.view(record, part.plane).view(part.num_rows, -1))
                for part in self.parts(shape)
                if part.matrix.name == name
            ]
        )


def decode_rows(kind: GgufType, rows: Tensor) -> Tensor:
    """uint8 ``[rows, row_bytes]`` on the CPU -> fp32 ``[rows, K]``: the numbers that the `gguf` package gives."""
    import gguf

    values = gguf.dequantize(rows.contiguous().numpy(), gguf.GGMLQuantizationType[kind.name])
    return torch.from_numpy(values)


def parse_gguf(name: str) -> GgufCodec | None:
    """The codec of a name that begins with `gguf:`; None for another name. Raises: ConfigError."""
    return _codec(name) if name.startswith(PREFIX) else None


def gguf_codec(kinds: Sequence[str]) -> GgufCodec:
    """The codec of these types: one object for equal types. Raises: ConfigError."""
    return _codec(PREFIX + ",".join(kinds))


@cache
def _codec(name: str) -> GgufCodec:
    return GgufCodec(name.removeprefix(PREFIX).split(","))


@cache
def _parts(name: str, shape: ExpertShape) -> tuple[GgufPart, ...]:
    kinds = _codec(name).kinds
    runs = [(matrix, half, 2 if half else 1) for matrix in shape.matrices for half in _halves(shape, matrix)]
    if len(runs) != len(kinds):
        raise ConfigError(f"A record of {len(runs)} matrices has no types {name}.")
    return tuple(
        GgufPart(
            matrix=matrix,
            plane=f"{matrix.name}.{half or 'codes'}",
            kind=kind,
            first_row=matrix.out_features // 2 if half == "up" else 0,
            num_rows=matrix.out_features // count,
        )
        for (matrix, half, count), kind in zip(runs, kinds, strict=True)
    )


def _halves(shape: ExpertShape, matrix: Matrix) -> tuple[str, ...]:
    return ("gate", "up") if shape.has_gate and matrix is shape.matrices[0] else ("",)


@cache
def _layout(name: str, shape: ExpertShape) -> RecordLayout:
    planes: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        (part.plane, torch.uint8, (part.num_bytes,)) for part in _parts(name, shape)
    ]
    planes += [(f"{bias}.values", torch.float32, (length,)) for bias, length in shape.biases]
    return pack_planes(planes)
