"""The panels of a plane, slowly: the reference of `native/csrc/panel_repack.c`. See docs/decisions/064."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from offload_moe.quant.layout import round_up

PANEL_ROWS = 16


def to_panels(elements: Tensor) -> Tensor:
    """Elements ``[rows, n]`` of one part -> flat: each panel of 16 rows, and the last of fewer, is transposed."""
    num_rows, count = elements.shape
    whole = num_rows // PANEL_ROWS * PANEL_ROWS
    panels = torch.empty(num_rows * count, dtype=elements.dtype)
    target = panels[: whole * count].view(-1, count, PANEL_ROWS)
    target.copy_(elements[:whole].view(-1, PANEL_ROWS, count).transpose(1, 2))
    panels[whole * count :].view(count, -1).copy_(elements[whole:].T)
    return panels


def from_panels(panels: Tensor, num_rows: int) -> Tensor:
    """The inverse: flat -> elements ``[rows, n]`` of one part."""
    count = panels.numel() // num_rows
    whole = num_rows // PANEL_ROWS * PANEL_ROWS
    elements = panels.new_empty(num_rows, count)
    elements[:whole].view(-1, PANEL_ROWS, count).copy_(
        panels[: whole * count].view(-1, count, PANEL_ROWS).transpose(1, 2)
    )
    elements[whole:].copy_(panels[whole * count :].view(count, -1).T)
    return elements


def rows_of_parts(panels: Tensor, num_rows: int, num_parts: int, rows: slice) -> Tensor:
    """Rows of a matrix of `num_parts` equal parts, each in panels: flat -> their elements ``[r, n]``, a copy."""
    count, size, pieces = panels.numel() // num_rows, num_rows // num_parts, []
    for start in range(0, num_rows, size):
        first, last = max(rows.start - start, 0), min(rows.stop - start, size)
        if first < last:
            begin, end = first // PANEL_ROWS * PANEL_ROWS, min(round_up(last, PANEL_ROWS), size)
            found = from_panels(panels[(start + begin) * count : (start + end) * count], end - begin)
            pieces.append(found[first - begin : last - begin])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def panels_of_codes(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Codes of one matrix in groups of rows, one byte each ``[rows, bytes]`` -> the same bytes in panels, flat."""
    rest: Tensor | None = None
    for piece in pieces:
        rows = piece if rest is None else torch.cat([rest, piece])
        whole = len(rows) // PANEL_ROWS * PANEL_ROWS
        rest = rows[whole:].clone() if whole < len(rows) else None
        yield to_panels(_dwords(rows[:whole]))
    if rest is not None:
        yield to_panels(_dwords(rest))


def _dwords(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.int32)
