"""The interface of codecs: lay out, encode and decode one expert."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from offload_moe.quant.layout import ExpertShape, RecordLayout

# The scale of a block: of its greatest magnitude, as bitsandbytes has it, or of least squared error.
ABSMAX, LEAST_ERROR = "absmax", "error"
SCALES = (LEAST_ERROR, ABSMAX)


class Codec(Protocol):
    """Converts the tensors of one expert to one contiguous record, and back.

    Tensors are keyed by the parameter names of the experts module, each in the module's own layout.
    """

    name: str

    def layout(self, shape: ExpertShape) -> RecordLayout:
        """The place of each plane; the same for every expert of a layer."""
        ...

    def encode(self, shape: ExpertShape, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the record: uint8 ``[layout.record_bytes]``, zero padded."""
        ...

    def decode(self, shape: ExpertShape, record: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The slow reference: tensors in the module's own layout and the given dtype."""
        ...
