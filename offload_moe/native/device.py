"""Linear layers on records that lie in device memory, through bitsandbytes and torch.

The same functions run on the CPU, where they are tested. bitsandbytes' custom operators check neither device nor dtype;
the wrapper does.

t tokens, O out features, K in features, P padded in features.
"""

from collections.abc import Iterator
from functools import cache
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from offload_moe.quant import Codec, ExpertShape, Plane, get_codec
from offload_moe.quant.blockwise import BlockwiseCodec, bias_of
from offload_moe.quant.gguf import GgufCodec
from offload_moe.quant.gguf_device import decode_anywhere, rows_of_panels
from offload_moe.quant.layout import BLOCK
from offload_moe.quant.nf4 import NESTED_BLOCK, dynamic_map
from offload_moe.quant.panels import rows_of_parts

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE_WEIGHTS = 1 << 24  # decoded at once, by rows: an output head may have forty times as many


class RecordLinear:
    """One matrix of a record, as a linear layer.

    nf4 is multiplied by `gemm_4bit`; the other quantizing codecs are decoded first, a large matrix by tiles of rows.
    Records in panels are copied to rows by such tiles, too. The lossless codec uses the operations of the module's
    eager code on the same layout: the same bits.
    """

    def __init__(self, shape: ExpertShape, codec: Codec, name: str, *, in_panels: bool = False) -> None:
        """in_panels: records are in the order of the device pass."""
        layout = codec.layout(shape)
        self._codec, self._shape, self._in_panels = codec, shape, in_panels
        self._matrix = next(matrix for matrix in shape.matrices if matrix.name == name)
        self._num_parts = 2 if shape.has_gate and self._matrix is shape.matrices[0] else 1
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
        if isinstance(self._codec, GgufCodec):
            return self._of_blocks(x, record, bias)
        if isinstance(self._codec, BlockwiseCodec):
            return self._by_tiles(x, record, bias)
        values = _view(record, self._planes["values"]).to(x.dtype)
        x = x @ values if self._is_transposed else functional.linear(x, values)
        return x if bias is None else x + bias

    def _of_blocks(self, x: Tensor, record: Tensor, bias: Tensor | None) -> Tensor:
        """A matrix of GGUF's types, decoded by tiles of each part's rows."""
        assert isinstance(self._codec, GgufCodec)
        outs = []
        for part in self._codec.parts(self._shape):
            if part.matrix.name != self._matrix.name:
                continue
            plane = _view(record, self._planes[part.plane.removeprefix(f"{self._matrix.name}.")])
            for tile in _tiles(part.num_rows, tile_rows(self._matrix.in_features)):
                rows = plane.view(part.num_rows, -1)[tile]
                if self._in_panels:
                    rows = rows_of_panels(part.kind, plane.flatten(), part.num_rows, tile)
                outs.append(functional.linear(x, decode_anywhere(part.kind, rows).to(x)))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return out if bias is None else out + bias

    def _by_tiles(self, x: Tensor, record: Tensor, bias: Tensor | None) -> Tensor:
        num_rows, step = self._matrix.out_features, self._tile_rows()
        if num_rows <= step:
            return self._multiply(x, record, slice(0, num_rows), bias)
        out = x.new_empty(len(x), num_rows)
        for tile in _tiles(num_rows, step):
            out[:, tile] = self._multiply(x, record, tile, None if bias is None else bias[tile])
        return out

    def _tile_rows(self) -> int:
        """Nested scales belong to whole blocks of scales, in which tiles of nf4 begin; in rows it needs no tiles."""
        most = tile_rows(self._matrix.in_features)
        if self._codec.name != "nf4":
            return most
        together = NESTED_BLOCK // gcd(NESTED_BLOCK, self._planes["absmax"].shape[0] // self._matrix.out_features)
        return max(most // together * together, together) if self._in_panels else self._matrix.out_features

    def _multiply(self, x: Tensor, record: Tensor, tile: slice, bias: Tensor | None) -> Tensor:
        assert isinstance(self._codec, BlockwiseCodec)
        if self._codec.name == "nf4":
            return self._nf4(x, record, tile, bias)
        planes = {name: self._rows(record, name, tile) for name in self._planes if "." not in name}
        return functional.linear(x, self._codec.decode_matrix(planes)[:, : self._matrix.in_features].to(x.dtype), bias)

    def _nf4(self, x: Tensor, record: Tensor, tile: slice, bias: Tensor | None) -> Tensor:
        codes, absmax = (self._rows(record, name, tile) for name in ("codes", "absmax"))
        padded_in = codes.shape[1] * 2
        if padded_in != self._matrix.in_features:
            x = functional.pad(x, (0, padded_in - self._matrix.in_features))
        first_block = tile.start * padded_in // BLOCK // NESTED_BLOCK
        num_blocks = -(-len(absmax) // NESTED_BLOCK)
        out: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x,
            codes.view(-1, 1),
            [len(codes), padded_in],
            _view(record, self._planes["absmax_scale"])[first_block : first_block + num_blocks],
            BLOCK,
            "nf4",
            bias,
            absmax_8bit=absmax,
            absmax_code=_dynamic_map_on(x.device),
            absmax_offset=_view(record, self._planes["absmax_offset"]).view(()),
        )
        return out

    def _rows(self, record: Tensor, name: str, tile: slice) -> Tensor:
        """A plane's part of some rows; blocks never cross a row."""
        plane, num_rows = self._planes[name], self._matrix.out_features
        each = plane.shape[0] // num_rows
        values = _view(record, plane)
        if not self._in_panels:
            return values[tile.start * each : tile.stop * each]
        element = torch.int32 if name == "codes" else plane.dtype
        rows = rows_of_parts(values.flatten().view(element), num_rows, self._num_parts, tile)
        return rows.view(plane.dtype).view(-1, *plane.shape[1:])


def _tiles(num_rows: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step))


def tile_rows(in_features: int) -> int:
    """The most rows of a matrix that are decoded at once."""
    return max(1, TILE_WEIGHTS // in_features)


def record_linear(
    x: Tensor, record: Tensor, shape: ExpertShape, codec: Codec, name: str, *, in_panels: bool = False
) -> Tensor:
    """Compute ``x [t, K] @ W.T + bias -> [t, O]`` with the matrix `name` of a record."""
    return linear_of(shape, codec, name, in_panels=in_panels)(x, record)


def linear_of(shape: ExpertShape, codec: Codec, name: str, *, in_panels: bool = False) -> RecordLinear:
    """The linear of the matrix `name`; layers of one shape share it. in_panels: see `RecordLinear`."""
    return _linear_of(shape, codec.name, name, in_panels)


@cache
def _linear_of(shape: ExpertShape, codec_name: str, name: str, in_panels: bool) -> RecordLinear:
    return RecordLinear(shape, get_codec(codec_name), name, in_panels=in_panels)


def keeps_module_order(codec: Codec) -> bool:
    """Whether the first matrix has gate and up rows in the module's order; otherwise gate comes before up."""
    return not isinstance(codec, BlockwiseCodec | GgufCodec)


def _view(record: Tensor, plane: Plane) -> Tensor:
    typed = record if plane.dtype == torch.uint8 else record.view(plane.dtype)
    strides = (plane.shape[1], 1) if len(plane.shape) == 2 else (1,)
    offset = typed.storage_offset() + plane.offset // plane.dtype.itemsize
    return typed.as_strided(plane.shape, strides, offset)


@cache
def _dynamic_map_on(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return dynamic_map().to(device)
