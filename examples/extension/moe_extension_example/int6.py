"""A codec: symmetric 6-bit codes with one fp32 scale per block of 64 along a row, 6.5 bits per weight."""

from collections.abc import Mapping

import torch
from torch import Tensor

from offload_moe.quant.blockwise import BlockwiseCodec, PlaneSpec

BLOCK = 64
MOST = 31  # codes are -31 to 31, kept from 1 to 63


class Int6Codec(BlockwiseCodec):
    """``weight = code * scale`` with ``scale = absmax / 31``; four codes lie in three bytes, the first one lowest."""

    name = "int6"

    def matrix_planes(self, out_features: int, padded_in: int) -> list[PlaneSpec]:
        return [
            ("codes", torch.uint8, (out_features, padded_in * 3 // 4)),
            ("scales", torch.float32, (out_features * padded_in // BLOCK,)),
        ]

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        blocks = rows.float().view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1) / MOST
        divisor = torch.where(scales == 0, 1.0, scales)
        codes = (blocks / divisor[:, None]).round().clamp(-MOST, MOST).int() + MOST + 1
        first, second, third, fourth = codes.view(-1, 4).unbind(1)
        parts = (first | second << 6, second >> 2 | third << 4, third >> 4 | fourth << 2)
        return {"codes": (torch.stack(parts, 1) & 255).to(torch.uint8).view(len(rows), -1), "scales": scales}

    def decode_matrix(self, planes: Mapping[str, Tensor]) -> Tensor:
        low, middle, high = planes["codes"].int().view(-1, 3).unbind(1)
        codes = torch.stack((low, low >> 6 | middle << 2, middle >> 4 | high << 4, high >> 2), 1) & 63
        weights = (codes.view(-1, BLOCK) - MOST - 1) * planes["scales"][:, None]
        return weights.view(len(planes["codes"]), -1)

    def is_finite(self, planes: Mapping[str, Tensor]) -> bool:
        return bool(planes["scales"].isfinite().all())


CODEC = Int6Codec()
