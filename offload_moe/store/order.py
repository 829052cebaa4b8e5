"""The order of the rows in a record: one after another, or in panels (docs/decisions/064-one-arithmetic.md)."""

from typing import Literal

from torch import Tensor

from offload_moe.native.kernels import PanelOrder
from offload_moe.native.planes import not_in_panels_reason

Order = Literal["rows", "panels"]


def order_of_codec(codec: str) -> Order:
    """The order in which records of this codec are written: panels where it has them."""
    return "rows" if not_in_panels_reason(codec) else "panels"


def reorder(record: Tensor, panels: PanelOrder | None, found: Order, wished: Order) -> None:
    """Change the order of a record in place; nothing happens where it has no panels."""
    if panels is None or found == wished:
        return
    if wished == "panels":
        panels.to_panels(record)
    else:
        panels.to_rows(record)
