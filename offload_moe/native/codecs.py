"""Codecs that encode on the native kernels: the same bytes many times as fast, or others with less error."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offload_moe.errors import CheckpointError
from offload_moe.native.encode import encode_int8, encode_nf4, search_int8, search_nf4
from offload_moe.native.feedback import Feedback, feed_back, feedback_of
from offload_moe.quant import ABSMAX, LEAST_ERROR, Codec
from offload_moe.quant.blockwise import BlockwiseCodec, pad_rows
from offload_moe.quant.int8 import Int8Codec
from offload_moe.quant.layout import BLOCK, Matrix
from offload_moe.quant.moments import NO_MOMENTS, Moments, column_weights
from offload_moe.quant.nf4 import NESTED_BLOCK, Nf4Codec

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
    """nf4 with the scales and codes of least squared error, weighed by the moments of a matrix's inputs.

    Where the products of inputs are known, later columns take up the errors of earlier ones.
    """

    def __init__(self, moments: Moments = NO_MOMENTS) -> None:
        self._moments = moments
        self._last: tuple[str, Feedback] | None = None  # of a matrix, whose rows may come in many runs

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        return search_nf4(rows)

    def encode_rows(self, matrix: Matrix, rows: Tensor) -> dict[str, Tensor]:
        moments = self._moments.get(matrix.name)
        if moments is None:
            return super().encode_rows(matrix, rows)
        rows = pad_rows(rows)
        planes = search_nf4(rows, column_weights(moments, rows.shape[1]))
        if moments.dim() == 1:
            return planes
        if self._last is None or self._last[0] != matrix.name:
            self._last = matrix.name, feedback_of(moments, rows.shape[1])
        return feed_back(rows, planes, self._last[1])

    def rows_together(self, padded_in: int) -> int:
        return NESTED_BLOCK // math.gcd(NESTED_BLOCK, padded_in // BLOCK)

    def kept_of_piece(self, rows: Tensor, planes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return BlockwiseCodec.kept_of_piece(self, rows, planes)

    def joined(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**kept, "absmax_offset": kept["absmax_offset"].sum().view(1)}


class SearchedInt8Codec(Int8Codec):
    """int8 with the scales of least squared error, weighed by the mean squares of a matrix's inputs."""

    def __init__(self, moments: Moments = NO_MOMENTS) -> None:
        self._moments = moments

    def encode_matrix(self, rows: Tensor) -> dict[str, Tensor]:
        return search_int8(rows)

    def encode_rows(self, matrix: Matrix, rows: Tensor) -> dict[str, Tensor]:
        rows, moments = pad_rows(rows), self._moments.get(matrix.name)
        return search_int8(rows, None if moments is None else column_weights(moments, rows.shape[1]))


def fast_encoding(codec: Codec, scales: str = ABSMAX, moments: Moments = NO_MOMENTS) -> Codec:
    """The codec, encoding on the native kernels if it is nf4 or int8.

    scales: `ABSMAX` writes the bytes of the codec itself, `LEAST_ERROR` others of the same form, with errors weighed by
        the moments.

    Raises: CheckpointError for moments that are not finite.
    """
    if scales == LEAST_ERROR and codec.name in _SEARCHING:
        _check_finite(moments)
        return _SEARCHING[codec.name](moments)
    return _NATIVE.get(codec.name, codec)


_NATIVE: dict[str, Codec] = {"nf4": NativeNf4Codec(), "int8": NativeInt8Codec()}
_SEARCHING: dict[str, Callable[[Moments], Codec]] = {"nf4": SearchedNf4Codec, "int8": SearchedInt8Codec}


def _check_finite(moments: Moments) -> None:
    for matrix, values in moments.items():
        if not values.isfinite().all():
            raise CheckpointError(
                f"{matrix} has inputs that are NaN or too large to weigh its errors by. Download the model again, or "
                "leave --calibrate and --imatrix out."
            )


def _is_native(rows: Tensor) -> bool:
    return rows.is_cpu and rows.dtype in NATIVE_DTYPES
