"""One native call per MoE layer."""

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.bindings import library
from offload_moe.native.constants import ACTIVATIONS
from offload_moe.native.planes import (
    DTYPES,
    address_of,
    check_rows,
    order_reason,
    record_structs,
    unsupported_reason,
)
from offload_moe.native.structs import MatrixStruct, MoeLayerStruct
from offload_moe.quant.layout import ExpertShape, RecordLayout

_SHORT_OF_MEMORY = -1


class ExpertKernel:
    """The experts of one layer: first matrix, activation, second matrix, weighted sum.

    Shape legend: T tokens, H hidden, N active experts, P pairs (a token routed to an expert).

    codec, activation: names of its records' codec and of a key of `ACTIVATIONS`.
    """

    def __init__(
        self,
        codec: str,
        shape: ExpertShape,
        layout: RecordLayout,
        *,
        activation: str,
        has_gate: bool = True,
        alpha: float = 1.702,
        limit: float = 7.0,
        in_panels: bool = False,
    ) -> None:
        """`alpha` and `limit` are the parameters of the `gpt_oss` activation.

        `in_panels`: records are in `PanelOrder` and activations in int8; else they are in rows and in fp32.

        Raises: ConfigError.
        """
        if reason := unsupported_reason(codec, shape) or order_reason(codec, in_panels=in_panels):
            raise ConfigError(f"No native kernel for these experts: {reason}. Use torch's operators.")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"Unknown activation {activation!r}. Choose one of: {', '.join(ACTIVATIONS)}.")
        first, *up, second = record_structs(codec, shape, layout, [in_panels * (2 if has_gate else 1), int(in_panels)])
        self._hidden = shape.matrices[-1].out_features
        self.codec, self.activation = codec, activation
        self._layer = MoeLayerStruct(
            first=first,
            second=second,
            up=up[0] if up else MatrixStruct(),
            activation=ACTIVATIONS[activation],
            has_gate=has_gate,
            is_interleaved=shape.is_interleaved and codec == "bf16",  # the other codecs store gate rows first
            alpha=alpha,
            limit=limit,
        )
        self.struct_address = ctypes.addressof(self._layer)
        self._native = library().om_moe_forward

    @property
    def struct(self) -> MoeLayerStruct:
        """As native code reads it."""
        return self._layer

    def forward(
        self,
        x: Tensor,
        records: Sequence[Tensor | int],
        offsets: Sequence[int] | Tensor,
        token_ids: Sequence[int] | Tensor,
        weights: Sequence[float] | Tensor,
        out: Tensor,
        *,
        accumulate: bool = False,
        out_ids: Sequence[int] | None = None,
    ) -> None:
        """Set `out` to, or with `accumulate` add to it, the weighted sum of the experts for `x`.

        x: fp32 or bf16 ``[T, H]``. records: N records (uint8 tensors or addresses), in the order they are summed.
        offsets ``[N + 1]``, token_ids ``[P]`` (int32 if tensors), weights ``[P]`` (fp32 if a tensor): the pairs of
        expert n are ``offsets[n]:offsets[n + 1]``. out: ``[T, H]``, fp32, or bf16 without `accumulate`; not `x`.
        out_ids ``[P]``: the row of `out`, then fp32 ``[R, H]``, of each pair in place of its token's; other rows do not
        change.
        Raises: ConfigError.
        """
        check_rows("x", x, self._hidden)
        check_rows("out", out, self._hidden)
        if (accumulate and DTYPES[out.dtype]) or (out_ids is None and out.shape != x.shape):
            raise ConfigError(f"out is {out.dtype} {tuple(out.shape)}; x has {tuple(x.shape)}; only fp32 accumulates.")
        if out_ids is not None and (
            DTYPES[out.dtype]
            or len(out_ids) != len(token_ids)
            or not 0 <= min(out_ids, default=0) <= max(out_ids, default=0) < len(out)
        ):
            raise ConfigError(f"{len(out_ids)} rows of out for {len(token_ids)} pairs, of {len(out)} in {out.dtype}.")
        if len(offsets) != len(records) + 1 or len(token_ids) != len(weights):
            raise ConfigError(f"{len(records)} records, {len(offsets)} offsets, {len(token_ids)} pairs do not fit.")
        addresses = array("Q", [address_of(record) for record in records])
        offset_values, token_values, weight_values = _Array("i", offsets), _Array("i", token_ids), _Array("f", weights)
        rows = _Array("i", out_ids) if out_ids is not None else None
        status = self._native(
            *(self.struct_address, x.data_ptr(), x.shape[0], DTYPES[x.dtype], addresses.buffer_info()[0]),
            *(offset_values.address, token_values.address, rows.address if rows else None, weight_values.address),
            len(records),
            *(out.data_ptr(), DTYPES[out.dtype], accumulate),
        )
        if status == _SHORT_OF_MEMORY:
            raise MemoryError(f"No memory for the intermediate activations of {len(token_ids)} pairs.")
        if status:
            raise ConfigError(f"token_ids or offsets are out of range for {x.shape[0]} tokens, {len(token_ids)} pairs.")

    def forward_token(
        self,
        x: Tensor,
        addresses: Sequence[int],
        weights: Sequence[float],
        out: Tensor,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Compute `forward` for one token, an expert per weight: x, out ``[1, H]``, contiguous, one dtype; not checked.

        rows: set these rows of `out`, fp32 ``[R, H]``, one per expert, instead. Raises: MemoryError.
        """
        num_experts = len(addresses)
        records, offsets = array("Q", addresses), _counting(num_experts + 1)
        tokens, shares = _zeros(num_experts), array("f", weights)
        places = array("i", rows) if rows is not None else None
        status = self._native(
            *(self.struct_address, x.data_ptr(), 1, DTYPES[x.dtype], records.buffer_info()[0]),
            *(offsets.buffer_info()[0], tokens.buffer_info()[0], places and places.buffer_info()[0]),
            *(shares.buffer_info()[0], num_experts),
            *(out.data_ptr(), DTYPES[out.dtype], False),
        )
        if status:
            raise MemoryError(f"No memory for the intermediate activations of {num_experts} experts.")


def add_rows(rows: Tensor, out: Tensor) -> None:
    """Set out ``[1, H]`` to the sum of rows ``[N, H]``, added in their order in fp32; contiguous."""
    library().om_sum_rows(rows.data_ptr(), len(rows), rows.shape[1], out.data_ptr(), DTYPES[out.dtype])


@cache
def _counting(length: int) -> "array[int]":
    return array("i", range(length))


@cache
def _zeros(length: int) -> "array[int]":
    return array("i", bytes(4 * length))


class _Array:
    """A sequence or tensor as C memory, which lives as long as the object."""

    __slots__ = ("_owner", "address")

    def __init__(self, kind: str, values: Sequence[float] | Tensor) -> None:
        if isinstance(values, Tensor):
            self._owner: Tensor | array[float] = values.contiguous()
            self.address = self._owner.data_ptr()
        else:
            self._owner = array(kind, values)
            self.address = self._owner.buffer_info()[0]
