"""mxfp4: 4-bit floats with a power of two per 32 weights: 4.25 bits per weight, gpt-oss' own format.

A checkpoint in MXFP4 keeps its bits: the codec copies its blocks and scales. Numbers are rounded by the standard's
rule, which is exact for numbers that came from MXFP4.

Source: OCP Microscaling Formats v1.0, sections 5.2 to 5.4 and 6.3; transformers/integrations/mxfp4.py.
"""

import struct
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from offload_moe.quant.blockwise import IN_ALIGNMENT, BlockwiseCodec, PlaneSpec
from offload_moe.quant.layout import ExpertShape, Matrix, round_up

BLOCK = 32
E2M1_TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Midpoints between neighbours, ties to the even code: a tie that rounds up has the last number below its middle.
MIDDLES = (0.25, 0.75 * (1 - 2**-24), 1.25, 1.75 * (1 - 2**-24), 2.5, 3.5 * (1 - 2**-24), 5.0)
BIAS = 127
NOT_A_NUMBER = 255
SMALLEST_SCALE = 1 << 22  # fp32 bits of 2^-127
LARGEST_EXPONENT = 2  # of an E2M1 number: 6 is 1.5 * 2^2


class Mxfp4Codec(BlockwiseCodec):
    """E2M1 codes, the first of two in the low nibble, and E8M0 scales."""

    name = "mxfp4"

    def matrix_planes(self, out_features: int, padded_in: int) -> list[PlaneSpec]:
        return [
            ("codes", torch.uint8, (out_features, padded_in // 2)),
            ("scales", torch.uint8, (out_features * padded_in // BLOCK,)),
        ]

    def planes_of(self, shape: ExpertShape, matrix: Matrix, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Also takes a matrix as its blocks, uint8 ``[O, K/2]``, and scales, uint8 ``[O, K/32]``."""
        if f"{matrix.name}_blocks" not in tensors:
            return super().planes_of(shape, matrix, tensors)
        blocks, scales = (tensors[f"{matrix.name}_{part}"] for part in ("blocks", "scales"))
        padding = round_up(matrix.in_features, IN_ALIGNMENT) - matrix.in_features
        return {
            "codes": functional.pad(shape.gate_before_up(matrix.name, blocks), (0, padding // 2)),
            "scales": functional.pad(
                shape.gate_before_up(matrix.name, scales), (0, padding // BLOCK), value=BIAS
            ).flatten(),
        }

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        blocks = rows.float().view(-1, BLOCK)
        largest = blocks.abs().amax(dim=1)
        exponents = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT
        exponents = torch.where(largest == 0, 0, exponents).clamp(-BIAS, BIAS)
        scales = torch.where(largest.isfinite(), exponents + BIAS, NOT_A_NUMBER).to(torch.uint8)
        magnitudes = torch.ldexp(blocks.abs(), -exponents[:, None])
        codes = torch.bucketize(magnitudes, torch.tensor(MIDDLES), out_int32=True) + 8 * blocks.signbit()
        return {
            "codes": (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(rows.shape[0], -1),
            "scales": scales,
        }

    def decode_matrix(self, planes: Mapping[str, Tensor]) -> Tensor:
        return mxfp4_values(planes["codes"], planes["scales"].view(planes["codes"].shape[0], -1))

    def is_finite(self, planes: Mapping[str, Tensor]) -> bool:
        return not (planes["scales"] == NOT_A_NUMBER).any()


def mxfp4_values(codes: Tensor, scales: Tensor) -> Tensor:
    """codes uint8 ``[..., K/2]``, scales uint8 ``[..., K/32]`` -> fp32 ``[..., K]``, exact."""
    pairs = torch.tensor(_PAIRS, dtype=torch.int32, device=codes.device)[codes.int()]
    blocks: Tensor = pairs.view(torch.bfloat16).unflatten(-1, (-1, BLOCK))
    exponents = scales.int()
    bits = torch.where(exponents == 0, SMALLEST_SCALE, exponents << 23)  # fp32 with no mantissa is a power of two
    return (blocks * bits.view(torch.float32)[..., None]).flatten(-2)


def _pair(byte: int) -> int:
    """Both numbers of a byte as bf16, the first in the low half of an int32."""
    numbers = struct.pack("<ff", E2M1_TABLE[byte & 15], E2M1_TABLE[byte >> 4])
    return int.from_bytes(numbers[2:4] + numbers[6:8], "little", signed=True)


_PAIRS = [_pair(byte) for byte in range(256)]
