"""nf4: 4-bit NormalFloat, block 64, with nested 8-bit absmax: 4.127 bits per weight.

Codes, packing (even element in the high nibble) and the nested scales are bitsandbytes' own, so that the same bytes
serve `gemm_4bit` on the device and our kernels on the CPU.

Source: QLoRA (Dettmers et al. 2023), sections 3 and 4; bitsandbytes `functional.quantize_4bit`.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from offload_moe.quant.blockwise import BlockwiseCodec, PlaneSpec
from offload_moe.quant.layout import BLOCK

NESTED_BLOCK = 256

# fmt: off
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@cache
def dynamic_map() -> Tensor:
    """The 256 signed values that nested absmax codes index. fp32 ``[256]``.

    Source: "8-bit Approximations for Parallelism in Deep Learning" (Dettmers 2015); bitsandbytes `create_dynamic_map`.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        magnitudes = (10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


class Nf4Codec(BlockwiseCodec):
    """Weights in 16 levels of a normal distribution, scaled per block of 64 along a row."""

    name = "nf4"

    def matrix_planes(self, out_features: int, padded_in: int) -> list[PlaneSpec]:
        num_blocks = out_features * padded_in // BLOCK
        return [
            ("codes", torch.uint8, (out_features, padded_in // 2)),
            ("absmax", torch.uint8, (num_blocks,)),
            ("absmax_scale", torch.float32, (-(-num_blocks // NESTED_BLOCK),)),
            ("absmax_offset", torch.float32, (1,)),
        ]

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(rows, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        return {
            "codes": packed.view(rows.shape[0], -1),
            "absmax": state.absmax,
            "absmax_scale": state.state2.absmax,
            "absmax_offset": state.offset.view(1),
        }

    def kept_of_piece(self, rows: Tensor, planes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        least, greatest = rows.view(-1, BLOCK).aminmax(dim=1)  # makes no copy of the rows, as `abs` would
        return {"absmax": torch.maximum(greatest, -least).float()}

    def joined(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return nested_absmax(kept["absmax"])

    def decode_matrix(self, planes: Mapping[str, Tensor]) -> Tensor:
        codes = planes["codes"]
        table = torch.tensor(NF4_TABLE, device=codes.device)
        values = torch.stack([table[(codes >> 4).int()], table[(codes & 15).int()]], dim=-1)
        return (values.view(-1, BLOCK) * block_absmax(planes)[:, None]).view(codes.shape[0], -1)

    def is_finite(self, planes: Mapping[str, Tensor]) -> bool:
        return bool(planes["absmax_offset"].isfinite().all())


def nested_absmax(absmax: Tensor) -> dict[str, Tensor]:
    """The planes of fp32 scales ``[blocks]``, as `quantize_4bit` nests them."""
    from bitsandbytes.functional import quantize_blockwise

    offset = absmax.mean()
    nested, state = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return {"absmax": nested, "absmax_scale": state.absmax, "absmax_offset": offset.view(1)}


def block_absmax(planes: Mapping[str, Tensor]) -> Tensor:
    """Expand the nested absmax: one fp32 per block of 64 weights."""
    nested = dynamic_map().to(planes["absmax"].device)[planes["absmax"].int()]
    scale = planes["absmax_scale"].repeat_interleave(NESTED_BLOCK)[: nested.numel()]
    return nested * scale + planes["absmax_offset"]
