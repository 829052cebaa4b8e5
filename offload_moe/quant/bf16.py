"""bf16: the lossless codec. Values keep the module's own layout, so that arithmetic on them equals eager's."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from offload_moe.errors import CheckpointError
from offload_moe.quant.layout import ExpertShape, RecordLayout, pack_planes


class Bf16Codec:
    """Every parameter as bfloat16; bit-exact for checkpoints in bfloat16, rounded for wider ones."""

    name = "bf16"

    def layout(self, shape: ExpertShape) -> RecordLayout:
        return _layout(shape)

    def encode(self, shape: ExpertShape, tensors: Mapping[str, Tensor]) -> Tensor:
        layout = self.layout(shape)
        record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
        for name in shape.module_shapes():
            if not is_finite(tensors[name]):
                raise CheckpointError(f"{name} has NaN or infinite weights; they would spoil every answer.")
            layout.view(record, f"{name}.values").copy_(tensors[name])
        return record

    def decode(self, shape: ExpertShape, record: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        layout = self.layout(shape)
        return {plane.removesuffix(".values"): layout.view(record, plane).to(dtype) for plane in layout.planes}


@cache  # used for every expert that is computed
def _layout(shape: ExpertShape) -> RecordLayout:
    return pack_planes([(f"{name}.values", torch.bfloat16, dims) for name, dims in shape.module_shapes().items()])


def is_finite(values: Tensor) -> bool:
    """Whether every number is finite; a finite sum proves it quickly."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
