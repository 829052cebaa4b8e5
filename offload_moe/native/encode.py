"""Quantization on the native kernels.

`encode_*` give the bytes of bitsandbytes' CPU path; `search_*` give bytes of the same form with less error.
"""

import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.bindings import library
from offload_moe.native.planes import DTYPES
from offload_moe.quant.layout import BLOCK, round_up
from offload_moe.quant.nf4 import NESTED_BLOCK


def encode_nf4(rows: Tensor) -> dict[str, Tensor]:
    """Planes of a matrix ``[O, P]`` (fp32, bf16 or fp16; P a multiple of 64), bit-identical to bitsandbytes on the CPU.

    Returns codes uint8 ``[O, P/2]``, absmax uint8 ``[O*P/64]``, absmax_scale fp32, absmax_offset fp32 ``[1]``.
    Source: `bitsandbytes.functional.quantize_4bit(blocksize=64, compress_statistics=True, quant_type="nf4")`.
    """
    values, num_blocks = _blocks_of(rows)
    codes = torch.empty(rows.shape[0], rows.shape[1] // 2, dtype=torch.uint8)
    absmax = torch.empty(num_blocks, dtype=torch.float32)
    library().om_encode_nf4(values.data_ptr(), DTYPES[values.dtype], num_blocks, codes.data_ptr(), absmax.data_ptr())
    offset = absmax.mean()  # torch's own summation order is part of the format
    nested = torch.empty(num_blocks, dtype=torch.uint8)
    scales = torch.empty(round_up(num_blocks, NESTED_BLOCK) // NESTED_BLOCK, dtype=torch.float32)
    library().om_encode_nested(absmax.data_ptr(), offset.item(), num_blocks, nested.data_ptr(), scales.data_ptr())
    return {"codes": codes, "absmax": nested, "absmax_scale": scales, "absmax_offset": offset.view(1)}


def encode_int8(rows: Tensor) -> dict[str, Tensor]:
    """Planes of a matrix ``[O, P]``: codes int8 ``[O, P]``, scales fp32 ``[O*P/64]``, as the int8 codec writes them."""
    values, num_blocks = _blocks_of(rows)
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty(num_blocks, dtype=torch.float32)
    library().om_encode_int8(values.data_ptr(), DTYPES[values.dtype], num_blocks, codes.data_ptr(), scales.data_ptr())
    return {"codes": codes, "scales": scales}


def search_nf4(rows: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
    """As `encode_nf4`, with the scales and codes of least squared error, which bitsandbytes decodes as its own.

    Scales are signed, because the levels of nf4 are not symmetric, and their offset is 0 (NaN where a weight is not
    finite). importance: fp32 ``[P]``, by which the error of each column is multiplied.
    """
    values, num_blocks = _blocks_of(rows)
    codes = torch.empty(rows.shape[0], rows.shape[1] // 2, dtype=torch.uint8)
    nested = torch.empty(num_blocks, dtype=torch.uint8)
    scales = torch.empty(round_up(num_blocks, NESTED_BLOCK) // NESTED_BLOCK, dtype=torch.float32)
    library().om_search_nf4(
        values.data_ptr(),
        DTYPES[values.dtype],
        num_blocks,
        rows.shape[1] // BLOCK,
        _address(importance),
        codes.data_ptr(),
        nested.data_ptr(),
        scales.data_ptr(),
    )
    offset = scales.sum().view(1) * 0  # NaN where one of them is
    return {"codes": codes, "absmax": nested, "absmax_scale": scales, "absmax_offset": offset}


def search_int8(rows: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
    """As `encode_int8`, with the scales of least squared error. importance: fp32 ``[P]``, as in `search_nf4`."""
    values, num_blocks = _blocks_of(rows)
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty(num_blocks, dtype=torch.float32)
    library().om_search_int8(
        values.data_ptr(),
        DTYPES[values.dtype],
        num_blocks,
        rows.shape[1] // BLOCK,
        _address(importance),
        codes.data_ptr(),
        scales.data_ptr(),
    )
    return {"codes": codes, "scales": scales}


def _address(importance: Tensor | None) -> int | None:
    return None if importance is None else importance.data_ptr()


def _blocks_of(rows: Tensor) -> tuple[Tensor, int]:
    if rows.device.type != "cpu" or rows.dim() != 2 or rows.shape[1] % BLOCK:
        raise ConfigError(
            f"Cannot encode {tuple(rows.shape)} on {rows.device}: rows of a multiple of {BLOCK} on the CPU."
        )
    values = rows.float() if rows.dtype == torch.float16 else rows
    if values.dtype not in DTYPES:
        raise ConfigError(f"Cannot encode {rows.dtype}: fp32, bf16 or fp16 expected.")
    return values.contiguous(), rows.numel() // BLOCK
