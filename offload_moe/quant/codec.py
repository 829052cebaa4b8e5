"""What every codec offers: lay out, encode and decode one expert."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from offload_moe.quant.layout import ExpertShape, RecordLayout


class Codec(Protocol):
    """Turns the tensors of one expert into one contiguous record, and back.

    Tensors are keyed by the parameter names of the experts module, each in the module's own layout.
    """

    name: str

    def layout(self, shape: ExpertShape) -> RecordLayout:
        """Where each plane lies; the same for every expert of a layer."""
        ...

    def encode(self, shape: ExpertShape, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the record: uint8 ``[layout.record_bytes]``, zero padded."""
        ...

    def decode(self, shape: ExpertShape, record: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The slow reference: tensors in the module's own layout and the given dtype."""
        ...
