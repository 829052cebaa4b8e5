"""Codecs that encode on the native kernels: the same bytes many times as fast, or others with less error."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from offload_moe.native.encode import encode_int8, encode_nf4, search_int8, search_nf4
from offload_moe.quant import ABSMAX, LEAST_ERROR, Codec
from offload_moe.quant.blockwise import BlockwiseCodec
from offload_moe.quant.int8 import Int8Codec
from offload_moe.quant.nf4 import BLOCK, NESTED_BLOCK, Nf4Codec

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NativeNf4Codec(Nf4Codec):
    """nf4, encoded by the native kernel."""

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        return encode_nf4(rows) if _is_native(rows) else super().encode_matrix(rows)


class NativeInt8Codec(Int8Codec):
    """int8, encoded by the native kernel."""

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        return encode_int8(rows) if _is_native(rows) else super().encode_matrix(rows)


class SearchedNf4Codec(Nf4Codec):
    """nf4 with the scales and codes of least squared error."""

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        return search_nf4(rows)

    def rows_together(self, padded_in: int) -> int:
        return NESTED_BLOCK // math.gcd(NESTED_BLOCK, padded_in // BLOCK)

    def kept_of_piece(self, rows: Tensor, planes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return BlockwiseCodec.kept_of_piece(self, rows, planes)

    def joined(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**kept, "absmax_offset": kept["absmax_offset"].sum().view(1)}


class SearchedInt8Codec(Int8Codec):
    """int8 with the scales of least squared error."""

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        return search_int8(rows)


def fast_encoding(codec: Codec, scales: str = ABSMAX) -> Codec:
    """The codec, encoding on the native kernels if it is nf4 or int8.

    scales: `ABSMAX` writes the bytes of the codec itself, `LEAST_ERROR` others of the same form.
    """
    return (_SEARCHING if scales == LEAST_ERROR else _NATIVE).get(codec.name, codec)


_NATIVE: dict[str, Codec] = {"nf4": NativeNf4Codec(), "int8": NativeInt8Codec()}
_SEARCHING: dict[str, Codec] = {"nf4": SearchedNf4Codec(), "int8": SearchedInt8Codec()}


def _is_native(rows: Tensor) -> bool:
    return rows.is_cpu and rows.dtype in NATIVE_DTYPES
