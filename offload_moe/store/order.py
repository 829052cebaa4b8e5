"""The order of the rows in a record: one after another, or in panels (docs/decisions/064-one-arithmetic.md)."""

from functools import cache
from typing import Literal

from torch import Tensor

from offload_moe.native.kernels import PanelOrder
from offload_moe.native.planes import not_in_panels_reason
from offload_moe.quant import ExpertShape, get_codec

Order = Literal["rows", "panels"]


def order_of_codec(codec: str) -> Order:
    """The order in which records of this codec are written: panels where it has them."""
    return "rows" if not_in_panels_reason(codec) else "panels"


@cache
def panel_order(codec: str, shape: ExpertShape) -> PanelOrder | None:
    """What changes the order of such records; None where their rows are always one after another."""
    if order_of_codec(codec) == "rows":
        return None
    return PanelOrder(codec, shape, get_codec(codec).layout(shape), has_gate=shape.has_gate)


def reorder(record: Tensor, panels: PanelOrder | None, found: Order, wished: Order) -> None:
    """Change the order of a record in place; nothing happens where it has no panels."""
    if panels is None or found == wished:
        return
    if wished == "panels":
        panels.to_panels(record)
    else:
        panels.to_rows(record)
