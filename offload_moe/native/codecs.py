"""Codecs that encode on the native kernels: the same bytes, many times as fast."""

import torch
from torch import Tensor

from offload_moe.native.encode import encode_int8, encode_nf4
from offload_moe.quant import Codec
from offload_moe.quant.int8 import Int8Codec
from offload_moe.quant.nf4 import Nf4Codec

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NativeNf4Codec(Nf4Codec):
    """nf4, encoded by the native kernel."""

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        return encode_nf4(rows) if _is_native(rows) else super().encode_matrix(rows)


class NativeInt8Codec(Int8Codec):
    """int8, encoded by the native kernel."""

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        return encode_int8(rows) if _is_native(rows) else super().encode_matrix(rows)


def fast_encoding(codec: Codec) -> Codec:
    """The codec itself, or one that writes the same bytes on the native kernels."""
    return _NATIVE.get(codec.name, codec)


_NATIVE: dict[str, Codec] = {"nf4": NativeNf4Codec(), "int8": NativeInt8Codec()}


def _is_native(rows: Tensor) -> bool:
    return rows.is_cpu and rows.dtype in NATIVE_DTYPES
