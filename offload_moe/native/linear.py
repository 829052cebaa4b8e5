"""Dense linears on the expert kernels: attention projections, shared experts, lm_head."""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.bindings import library
from offload_moe.native.planes import (
    DTYPES,
    address_of,
    check_rows,
    order_reason,
    record_structs,
    shares_inputs,
    unsupported_reason,
)
from offload_moe.native.structs import MatrixStruct
from offload_moe.quant.layout import ExpertShape, RecordLayout


class LinearKernel:
    """Several matrices on the same input, in one call: q, k and v, or gate and up.

    Shape legend: T tokens, K in features, O out features of one matrix.
    """

    def __init__(
        self,
        codec: str | Sequence[str],
        shapes: Sequence[ExpertShape],
        layouts: Sequence[RecordLayout],
        *,
        num_parts: int = 0,
    ) -> None:
        """`codec`: of all records, or one of each, which `shares_inputs`. `num_parts`: records are in panels of so many
        parts. `shapes`: one-matrix shapes with the same in features.

        Raises: ConfigError.
        """
        matrices = [shape.matrices[0] for shape in shapes]
        codecs = [codec] * len(shapes) if isinstance(codec, str) else codec
        for each, shape in zip(codecs, shapes, strict=True):
            if reason := unsupported_reason(each, shape) or order_reason(each, in_panels=num_parts > 0):
                raise ConfigError(f"No native kernel for this linear: {reason}. Use torch's operators.")
        if not shares_inputs(codecs):
            raise ConfigError(f"The linears of one call have the codecs {', '.join(codecs)}.")
        if len({m.in_features for m in matrices}) != 1:
            raise ConfigError(
                f"The linears of one call read one input, not {[m.in_features for m in matrices]} features."
            )
        self._in_features = matrices[0].in_features
        self._out_features = [m.out_features for m in matrices]
        self._starts = [sum(self._out_features[:index]) for index in range(len(matrices))]
        self._sum_features = sum(self._out_features)
        structs = [
            record_structs(each, shape, layout, [num_parts])[0]
            for each, shape, layout in zip(codecs, shapes, layouts, strict=True)
        ]
        self._matrices = (MatrixStruct * len(structs))(*structs)
        self._matrices_address = ctypes.addressof(self._matrices)
        self._native = library().om_linear_forward

    def forward(
        self,
        x: Tensor,
        records: Sequence[Tensor | int],
        outs: Sequence[Tensor],
    ) -> None:
        """Set ``outs[i]`` to ``x @ matrix_i.T + bias_i``.

        x: fp32 or bf16 ``[T, K]``. outs: fp32 or bf16 ``[T, O_i]``, all of one dtype. Raises: ConfigError.
        """
        check_rows("x", x, self._in_features)
        for out, features in zip(outs, self._out_features, strict=True):
            check_rows("out", out, features)
            if out.dtype != outs[0].dtype or out.shape[0] != x.shape[0]:
                raise ConfigError(
                    f"out is {out.dtype} {tuple(out.shape)}; {outs[0].dtype}, {x.shape[0]} rows expected."
                )
        self._call(x, records, [out.data_ptr() for out in outs], outs[0].dtype)

    def step(self, x: Tensor, record: Tensor, out: Tensor) -> None:
        """Set `out` to ``x @ matrix.T + bias`` of the only matrix: contiguous; not checked, this is the hot path."""
        self._call(x, [record], [out.data_ptr()], out.dtype)

    def forward_row(self, x: Tensor, records: Sequence[Tensor | int], out: Tensor) -> None:
        """Compute one token into one buffer: x ``[1, K]``, out ``[1, sum of O_i]``. Raises: ConfigError."""
        check_rows("x", x, self._in_features)
        check_rows("out", out, self._sum_features)
        if x.shape[0] != 1 or out.shape[0] != 1:
            raise ConfigError(f"forward_row takes one token, not {x.shape[0]} into {out.shape[0]} rows.")
        first = out.data_ptr()
        targets = [first + start * out.element_size() for start in self._starts]
        self._call(x, records, targets, out.dtype)

    def _call(self, x: Tensor, records: Sequence[Tensor | int], targets: Sequence[int], dtype: torch.dtype) -> None:
        addresses = array("Q", [address_of(record) for record in records])
        places, num_tokens = array("Q", targets), x.numel() // self._in_features
        status = self._native(
            *(self._matrices_address, addresses.buffer_info()[0], places.buffer_info()[0], len(addresses)),
            *(x.data_ptr(), num_tokens, DTYPES[x.dtype], DTYPES[dtype]),
        )
        if status:
            raise MemoryError(f"No memory for the activations of {num_tokens} tokens.")
