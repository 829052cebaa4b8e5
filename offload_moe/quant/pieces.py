"""A matrix encoded piece by piece: the bytes of the codec's own `encode`, without the whole matrix in memory.

Codes come first in a record and depend on their own block alone, so they are emitted at once; later planes are kept.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from offload_moe.errors import CheckpointError
from offload_moe.quant.blockwise import IN_ALIGNMENT, BlockwiseCodec, bias_of, pad_rows
from offload_moe.quant.layout import ExpertShape, round_up
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
    kept: list[dict[str, Tensor]] = []

    def codes() -> Iterator[Tensor]:
        together = codec.rows_together(round_up(matrix.in_features, IN_ALIGNMENT))
        for rows in _in_multiples(map(pad_rows, pieces), together):
            planes = codec.encode_rows(matrix, rows)
            kept.append(codec.kept_of_piece(rows, planes))
            yield planes["codes"]

    yield from map(_bytes, panels_of_codes(codes()) if in_panels else codes())
    rest = codec.joined({name: torch.cat([each[name] for each in kept]) for name in kept[0]})
    if not codec.is_finite(rest):
        raise CheckpointError(f"{matrix.name} has NaN or infinite weights; {codec.name} cannot encode them.")
    if in_panels:
        per_block = "scales" if "scales" in rest else "absmax"
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


def _in_multiples(pieces: Iterable[Tensor], num_rows: int) -> Iterator[Tensor]:
    """The same rows in pieces of a multiple of `num_rows`, but for the last."""
    rest: Tensor | None = None
    for piece in pieces:
        rows = piece if rest is None else torch.cat([rest, piece])
        whole = len(rows) // num_rows * num_rows
        if whole:
            yield rows[:whole]
        rest = rows[whole:] if whole < len(rows) else None
    if rest is not None:
        yield rest


def _bytes(codes: Tensor) -> Tensor:
    return codes.reshape(-1).view(torch.uint8)
