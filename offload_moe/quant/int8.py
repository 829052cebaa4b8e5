"""int8: symmetric 8-bit codes with one fp32 scale per block of 64 along a row: 8.5 bits per weight."""

from collections.abc import Mapping

import torch
from torch import Tensor

from offload_moe.quant.blockwise import BlockwiseCodec, PlaneSpec
from offload_moe.quant.layout import BLOCK


class Int8Codec(BlockwiseCodec):
    """``weight = code * scale`` with ``scale = absmax / 127``."""

    name = "int8"

    def matrix_planes(self, out_features: int, padded_in: int) -> list[PlaneSpec]:
        return [
            ("codes", torch.int8, (out_features, padded_in)),
            ("scales", torch.float32, (out_features * padded_in // BLOCK,)),
        ]

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        blocks = rows.float().view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1) / 127
        divisor = torch.where(scales == 0, 1.0, scales)
        codes = (blocks / divisor[:, None]).round().clamp(-127, 127).to(torch.int8)
        return {"codes": codes.view(rows.shape), "scales": scales}

    def decode_matrix(self, planes: Mapping[str, Tensor]) -> Tensor:
        codes = planes["codes"]
        return (codes.view(-1, BLOCK) * planes["scales"][:, None]).view(codes.shape)

    def is_finite(self, planes: Mapping[str, Tensor]) -> bool:
        return bool(planes["scales"].isfinite().all())
