"""Linear layers on records that lie in device memory, through bitsandbytes and torch.

The same functions run on the CPU, where they are tested. bitsandbytes' custom operators check neither device nor dtype;
the wrapper does.

t tokens, O out features, K in features, P padded in features.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from offload_moe.quant import Codec, ExpertShape, Plane, get_codec
from offload_moe.quant.blockwise import BlockwiseCodec, bias_of
from offload_moe.quant.gguf import GgufCodec
from offload_moe.quant.gguf_device import decode_anywhere, rows_of_panels
from offload_moe.quant.layout import BLOCK
from offload_moe.quant.nf4 import dynamic_map
from offload_moe.quant.panels import from_panels

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PANEL_PLANES = {"nf4": ("codes", "absmax"), "int8": ("codes", "scales"), "mxfp4": ("codes", "scales")}
TILE_WEIGHTS = 1 << 24  # decoded at once, by rows: an output head may have forty times as many


class RecordLinear:
    """One matrix of a record, as a linear layer.

    nf4 is multiplied in place by `gemm_4bit`; the other quantizing codecs are decoded first, a large matrix by tiles of
    rows. The lossless codec uses the operations of the module's eager code on the same layout: the same bits.
    """

    def __init__(self, shape: ExpertShape, codec: Codec, name: str) -> None:
        layout = codec.layout(shape)
        self._codec, self._shape = codec, shape
        self._matrix = next(matrix for matrix in shape.matrices if matrix.name == name)
        self._is_transposed = shape.is_transposed
        self._planes = {key.removeprefix(f"{name}."): plane for key, plane in layout.planes.items()}
        self._bias = layout.planes.get(f"{bias_of(self._matrix)}.values")
        self._record_bytes = layout.num_bytes
        if codec.name == "nf4":
            import bitsandbytes  # noqa: F401  # registers the operator

    def __call__(self, x: Tensor, record: Tensor) -> Tensor:
        """Compute ``x [t, K] -> [t, O]`` in the dtype of `x`, on its device. record: uint8, of the layout's bytes."""
        assert x.device == record.device, f"x is on {x.device}, the record on {record.device}"
        assert x.dtype in COMPUTE_DTYPES, x.dtype
        assert record.dtype == torch.uint8, record.dtype
        assert record.numel() >= self._record_bytes, (record.shape, self._record_bytes)
        bias = None if self._bias is None else _view(record, self._bias).to(x.dtype)
        if self._codec.name == "nf4":
            return self._nf4(x, record, bias)
        if isinstance(self._codec, GgufCodec):
            return self._of_blocks(x, record, bias)
        if isinstance(self._codec, BlockwiseCodec):
            return self._decoded(x, record, bias)
        values = _view(record, self._planes["values"]).to(x.dtype)
        x = x @ values if self._is_transposed else functional.linear(x, values)
        return x if bias is None else x + bias

    def _nf4(self, x: Tensor, record: Tensor, bias: Tensor | None) -> Tensor:
        planes = self._planes
        padded_in = planes["codes"].shape[1] * 2
        if padded_in != self._matrix.in_features:
            x = functional.pad(x, (0, padded_in - self._matrix.in_features))
        out: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x,
            _view(record, planes["codes"]).view(-1, 1),
            [self._matrix.out_features, padded_in],
            _view(record, planes["absmax_scale"]),
            BLOCK,
            "nf4",
            bias,
            absmax_8bit=_view(record, planes["absmax"]),
            absmax_code=_dynamic_map_on(x.device),
            absmax_offset=_view(record, planes["absmax_offset"]).view(()),
        )
        return out

    def _of_blocks(self, x: Tensor, record: Tensor, bias: Tensor | None) -> Tensor:
        """A matrix of GGUF's types, decoded by tiles of each part's rows."""
        assert isinstance(self._codec, GgufCodec)
        outs, step = [], tile_rows(self._matrix.in_features)
        for part in self._codec.parts(self._shape):
            if part.matrix.name != self._matrix.name:
                continue
            rows = _view(record, self._planes[part.plane.removeprefix(f"{self._matrix.name}.")]).view(part.num_rows, -1)
            outs += [functional.linear(x, decode_anywhere(part.kind, tile).to(x)) for tile in rows.split(step)]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return out if bias is None else out + bias

    def _decoded(self, x: Tensor, record: Tensor, bias: Tensor | None) -> Tensor:
        num_rows = self._matrix.out_features
        if num_rows <= tile_rows(self._matrix.in_features):
            return functional.linear(x, self._rows(record, slice(0, num_rows), x.dtype), bias)
        out = x.new_empty(len(x), num_rows)
        for tile in self._tiles():
            part = None if bias is None else bias[tile]
            out[:, tile] = functional.linear(x, self._rows(record, tile, x.dtype), part)
        return out

    def _rows(self, record: Tensor, tile: slice, dtype: torch.dtype) -> Tensor:
        """Decoded rows ``[o, K]``."""
        assert isinstance(self._codec, BlockwiseCodec)
        num_rows = self._matrix.out_features
        planes = {
            name: _view(record, _part(plane, tile, num_rows)) for name, plane in self._planes.items() if "." not in name
        }
        return self._codec.decode_matrix(planes)[:, : self._matrix.in_features].to(dtype)

    def _tiles(self) -> Iterator[slice]:
        num_rows, step = self._matrix.out_features, tile_rows(self._matrix.in_features)
        return (slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step))


def in_rows(record: Tensor, shape: ExpertShape, codec: Codec) -> Tensor:
    """A copy of a record in panels with its rows one after another, made where it lies."""
    layout, rows = codec.layout(shape), record.clone()
    if isinstance(codec, GgufCodec):
        for part in codec.parts(shape):
            panels = layout.view(rows, part.plane)
            panels.copy_(rows_of_panels(part.kind, panels, part.num_rows).flatten())
        return rows
    for index, matrix in enumerate(shape.matrices):
        num_parts = 2 if shape.has_gate and index == 0 else 1
        for name in PANEL_PLANES[codec.name]:
            plane = layout.planes[f"{matrix.name}.{name}"]
            element = torch.int32 if name == "codes" else plane.dtype
            place = slice(plane.offset, plane.offset + plane.num_bytes)
            parts = zip(record[place].chunk(num_parts), rows[place].chunk(num_parts), strict=True)
            for found, wished in parts:
                elements = from_panels(found.view(element), matrix.out_features // num_parts)
                wished.view(element).view(elements.shape).copy_(elements)
    return rows


def tile_rows(in_features: int) -> int:
    """The most rows of a matrix that are decoded at once."""
    return max(1, TILE_WEIGHTS // in_features)


def record_linear(x: Tensor, record: Tensor, shape: ExpertShape, codec: Codec, name: str) -> Tensor:
    """Compute ``x [t, K] @ W.T + bias -> [t, O]`` with the matrix `name` of a record."""
    return linear_of(shape, codec, name)(x, record)


def linear_of(shape: ExpertShape, codec: Codec, name: str) -> RecordLinear:
    """The linear of the matrix `name`; layers of one shape share it."""
    return _linear_of(shape, codec.name, name)


@cache
def _linear_of(shape: ExpertShape, codec_name: str, name: str) -> RecordLinear:
    return RecordLinear(shape, get_codec(codec_name), name)


def keeps_module_order(codec: Codec) -> bool:
    """Whether the first matrix has gate and up rows in the module's order; otherwise gate comes before up."""
    return not isinstance(codec, BlockwiseCodec | GgufCodec)


def _part(plane: Plane, tile: slice, num_rows: int) -> Plane:
    """The part of a plane for some rows of a matrix. Blocks never cross a row."""
    each = plane.shape[0] // num_rows
    skipped = tile.start * plane.num_bytes // num_rows
    shape = ((tile.stop - tile.start) * each, *plane.shape[1:])
    return replace(plane, offset=plane.offset + skipped, shape=shape)


def _view(record: Tensor, plane: Plane) -> Tensor:
    typed = record if plane.dtype == torch.uint8 else record.view(plane.dtype)
    strides = (plane.shape[1], 1) if len(plane.shape) == 2 else (1,)
    offset = typed.storage_offset() + plane.offset // plane.dtype.itemsize
    return typed.as_strided(plane.shape, strides, offset)


@cache
def _dynamic_map_on(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return dynamic_map().to(device)
