"""Records whose rows are kept in panels of 16, and back: docs/decisions/064-one-arithmetic.md."""

import ctypes
from functools import cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.bindings import library
from offload_moe.native.planes import (
    address_of,
    not_in_panels_reason,
    record_structs,
    unsupported_reason,
)
from offload_moe.native.structs import MatrixStruct
from offload_moe.quant import get_codec
from offload_moe.quant.gguf import parse_gguf
from offload_moe.quant.layout import ExpertShape, RecordLayout, round_up
from offload_moe.quant.panels import PANEL_ROWS


class PanelOrder:
    """Both orders of one kind of record: planes keep their places and sizes, a plane's bytes change places.

    num_matrices: at `address`. scratch_bytes: that `om_repack` needs.
    """

    def __init__(self, codec: str, shape: ExpertShape, layout: RecordLayout, *, has_gate: bool = False) -> None:
        """`has_gate`: the first matrix has gate rows and then up rows, whose panels begin anew. Raises: ConfigError."""
        if reason := unsupported_reason(codec, shape) or not_in_panels_reason(codec):
            raise ConfigError(f"No panels for these records: {reason}.")
        structs = record_structs(
            codec, shape, layout, [2 if has_gate and m is shape.matrices[0] else 1 for m in shape.matrices]
        )
        self._matrices = (MatrixStruct * len(structs))(*structs)
        self.num_matrices = len(structs)
        self.scratch_bytes = _scratch_bytes(codec, shape)

    @property
    def address(self) -> int:
        """Of the matrices, for native code."""
        return ctypes.addressof(self._matrices)

    def to_panels(self, record: Tensor | int) -> None:
        """From row order, in place; a uint8 record or its address."""
        self._repack(record, True)

    def to_rows(self, record: Tensor | int) -> None:
        """The inverse, exactly."""
        self._repack(record, False)

    def _repack(self, record: Tensor | int, to_panels: bool) -> None:
        scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8)
        library().om_repack(self.address, self.num_matrices, address_of(record), to_panels, scratch.data_ptr())


def _scratch_bytes(codec: str, shape: ExpertShape) -> int:
    """That of a panel of the widest matrix; of GGUF's types also what lies beside the dwords of a whole part."""
    of_gguf = parse_gguf(codec)
    if of_gguf is None:
        return PANEL_ROWS * max(round_up(m.in_features, 64) for m in shape.matrices)
    parts = of_gguf.parts(shape)
    return max(PANEL_ROWS * part.num_bytes // part.num_rows + part.num_bytes - part.sides_offset for part in parts)


@cache
def panel_order(codec: str, shape: ExpertShape) -> PanelOrder | None:
    """What changes the order of such records; None where their rows are always one after another.

    Raises: ConfigError for records that no kernel reads.
    """
    if not_in_panels_reason(codec):
        return None
    return PanelOrder(codec, shape, get_codec(codec).layout(shape), has_gate=shape.has_gate)


class Repacking(NamedTuple):
    """A change of the order of a record's rows: to panels, or else from panels to rows."""

    order: PanelOrder
    to_panels: bool

    @classmethod
    def between(cls, found: PanelOrder | None, wished: PanelOrder | None) -> Self | None:
        """What brings a record from one order into the other, of which None is rows; None where nothing changes."""
        order = found or wished
        return None if order is None or (found is None) == (wished is None) else cls(order, wished is not None)
