"""A matrix encoded piece by piece: the bytes of the codec's own `encode`, without the whole matrix in memory.

Codes come first in a record and depend on their own block alone, so they are emitted at once; later planes are kept.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from offload_moe.errors import CheckpointError
from offload_moe.quant.blockwise import BlockwiseCodec, bias_of, pad_rows
from offload_moe.quant.int8 import Int8Codec
from offload_moe.quant.layout import ExpertShape
from offload_moe.quant.nf4 import BLOCK, Nf4Codec, nested_absmax
from offload_moe.quant.panels import panels_of_codes, to_panels


def encode_pieces(
    codec: BlockwiseCodec,
    shape: ExpertShape,
    pieces: Iterable[Tensor],
    bias: Tensor | None = None,
    *,
    in_panels: bool = False,
) -> Iterator[Tensor]:
    """The record of one nf4 or int8 matrix in uint8 pieces.

    shape: one matrix, kept as ``[O, K]``. pieces: its rows ``[o, K]`` in their order. in_panels: the record's rows are.

    Raises: CheckpointError at the end, when a weight is not finite.
    """
    (matrix,) = shape.matrices
    scales: list[Tensor] = []

    def codes() -> Iterator[Tensor]:
        for piece in pieces:
            rows = pad_rows(piece)
            planes = codec.encode_matrix(rows)
            scales.append(planes["scales"] if isinstance(codec, Int8Codec) else _absmax(rows))
            yield planes["codes"]

    yield from map(_bytes, panels_of_codes(codes()) if in_panels else codes())
    rest = _scale_planes(codec, torch.cat(scales))
    if not codec.is_finite(rest):
        raise CheckpointError(f"{matrix.name} has NaN or infinite weights; {codec.name} cannot encode them.")
    if in_panels:
        per_block = "scales" if isinstance(codec, Int8Codec) else "absmax"
        rest[per_block] = to_panels(rest[per_block].view(matrix.out_features, -1))
    named = {f"{matrix.name}.{plane}": value for plane, value in rest.items()}
    if bias is not None:
        named[f"{bias_of(matrix)}.values"] = bias
    layout = codec.layout(shape)
    start = layout.planes[f"{matrix.name}.codes"].num_bytes
    tail = torch.zeros(layout.record_bytes - start, dtype=torch.uint8)
    for name, value in named.items():
        plane = layout.planes[name]
        offset = plane.offset - start
        tail[offset : offset + plane.num_bytes].view(plane.dtype).view(plane.shape).copy_(value)
    yield tail


def _absmax(rows: Tensor) -> Tensor:
    """fp32, one for each block of a matrix."""
    least, greatest = rows.view(-1, BLOCK).aminmax(dim=1)  # makes no copy of the rows, as `abs` would
    return torch.maximum(greatest, -least).float()


def _scale_planes(codec: BlockwiseCodec, scales: Tensor) -> dict[str, Tensor]:
    if isinstance(codec, Int8Codec):
        return {"scales": scales}
    assert isinstance(codec, Nf4Codec)
    return nested_absmax(scales)


def _bytes(codes: Tensor) -> Tensor:
    return codes.reshape(-1).view(torch.uint8)
