"""Native calls: a norm, and grouped-query attention."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.bindings import library
from offload_moe.native.constants import MAX_ROTATED, ROTATIONS
from offload_moe.native.planes import DTYPES, record_structs
from offload_moe.native.rooms import Rooms, rooms_array
from offload_moe.native.structs import AttentionStruct, MatrixStruct
from offload_moe.quant.layout import ExpertShape, RecordLayout, pack_planes, weight_shape

HEAD_DIM_STEP = 16  # head dims are multiples of the widest vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One projection: its record, and the bias if it is not in the record."""

    codec: str
    shape: ExpertShape
    layout: RecordLayout
    record: Tensor
    bias: Tensor | None = None
    in_panels: bool = False  # the record's rows: see `PanelOrder`

    @classmethod
    def of_numbers(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """A projection by plain numbers: weight ``[O, K]``, fp32 or bf16 and contiguous, is read in place."""
        layout = pack_planes([("weight.values", weight.dtype, tuple(weight.shape))])
        codec = "fp32" if weight.dtype == torch.float32 else "bf16"
        return cls(codec=codec, shape=weight_shape(*weight.shape), layout=layout, record=weight, bias=bias)

    def struct(self) -> MatrixStruct:
        """The matrix as calls read it."""
        return record_structs(self.codec, self.shape, self.layout, [int(self.in_panels)])[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorm:
    """An RMS norm of each head, or of all heads at once if its weight is that long."""

    weight: Tensor
    epsilon: float


class NormKernel:
    """An RMS norm of some rows, or a layer norm, in fp32: the bits of each alone."""

    def __init__(self, weight: Tensor, epsilon: float, bias: Tensor | None = None) -> None:
        """weight, bias: fp32 ``[H]``, contiguous, on the CPU. bias: of a layer norm."""
        self._owned, self.epsilon, self.length = (weight, bias), epsilon, len(weight)
        self.weight_address, self.bias_address = weight.data_ptr(), optional_address(bias)
        self._native = library().om_norm

    def step(self, x: Tensor, out: Tensor) -> None:
        """Set `out` to the norm of `x`: fp32 ``[..., H]``, contiguous; not checked, this is the hot path.

        out: may be `x`.
        """
        num_rows = x.numel() // self.length
        weights = self.weight_address, self.bias_address
        self._native(x.data_ptr(), *weights, num_rows, self.length, self.epsilon, out.data_ptr())


class AttentionKernel:
    """Projections, head norms, rotary embedding, cache, attention and output projection of some tokens, in fp32.

    Each row's bits are those of a call of it alone. Shape legend: T rows, H hidden, N query heads, M key/value heads,
    D head dim, R rotated dims, C room in the cache.

    cache_dtype: of keys and values.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        *,
        head_dim: int,
        rotated_dims: int,
        scaling: float,
        norms: Sequence[HeadNorm | None] = (None, None),
        sinks: Tensor | None = None,
        rotation: str = "halves",
        is_normed_rotated: bool = False,
        query_scale: tuple[float, float] | None = None,
        cache_dtype: torch.dtype = torch.float32,
        is_gated: bool = False,
    ) -> None:
        """Settings of one layer. linears: query, key, value, output. norms: of query and key. Other tensors: fp32.

        rotated_dims: 0 rotates nothing. rotation: a key of `ROTATIONS`. is_normed_rotated: the norms come after it.
        query_scale: step and strength, as of `QueryScale`; rooms have all tokens then. cache_dtype: of keys and values,
        fp32 or bf16.
        is_gated: the first projection gives, of each head, its query and a gate, ``[N, 2, D]``; the sigmoid of that
        multiplies what the head attends to.

        Raises: ConfigError when the kernel lacks these dims.
        """
        outs = [linear.shape.matrices[0].out_features for linear in linears]
        outs[0] //= 1 + is_gated
        if head_dim % HEAD_DIM_STEP or rotated_dims % 2 or rotated_dims > head_dim:
            raise ConfigError(f"The attention kernel takes no heads of {head_dim} with {rotated_dims} rotated.")
        if rotation != "halves" and rotated_dims > MAX_ROTATED:
            raise ConfigError(f"The attention kernel turns {MAX_ROTATED} dims as pairs at most, not {rotated_dims}.")
        if outs[0] % outs[1] or outs[1] != outs[2] or any(out % head_dim for out in outs[:3]):
            raise ConfigError(f"Projections of {outs[:3]} features are not heads of {head_dim} in equal groups.")
        self.cache_dtype = cache_dtype
        self._owned = (linears, norms, sinks)
        addresses = [None if norm is None else norm.weight.data_ptr() for norm in norms]
        self._struct = AttentionStruct(
            matrices=(MatrixStruct * 4)(*(linear.struct() for linear in linears)),
            records=(ctypes.c_void_p * 4)(*(linear.record.data_ptr() for linear in linears)),
            biases=(ctypes.c_void_p * 4)(*(optional_address(linear.bias) for linear in linears)),
            norms=(ctypes.c_void_p * 2)(*addresses),
            sinks=optional_address(sinks),
            num_heads=outs[0] // head_dim,
            num_kv_heads=outs[1] // head_dim,
            head_dim=head_dim,
            rotated_dims=rotated_dims,
            norm_lengths=(ctypes.c_int64 * 2)(*(head_dim if norm is None else len(norm.weight) for norm in norms)),
            epsilons=(ctypes.c_float * 2)(*(0.0 if norm is None else norm.epsilon for norm in norms)),
            scaling=scaling,
            scale_step=0.0 if query_scale is None else query_scale[0],
            scale_strength=0.0 if query_scale is None else query_scale[1],
            is_normed_rotated=is_normed_rotated,
            rotation=ROTATIONS[rotation],
            cache_dtype=DTYPES[cache_dtype],
            is_gated=is_gated,
        )
        self.struct_address = ctypes.addressof(self._struct)
        self._native = library().om_attention_step

    def step(self, x: Tensor, cos: Tensor, signed_sin: Tensor, rooms: Rooms, out: Tensor) -> None:
        """Attend: x ``[..., H]`` of T rows -> out ``[..., H]``, fp32, contiguous; not checked, this is the hot path.

        cos, signed_sin ``[T, R]``. rooms: of each row. keys, values ``[1, M, C, D]`` in `cache_dtype`, at any distance
        between heads, hold as many tokens as the room says and get the row's. Rows of one sequence follow each other in
        the same room. Raises: MemoryError.
        """
        places = rooms_array(rooms)
        status = self._native(
            *(self.struct_address, x.data_ptr(), cos.data_ptr(), signed_sin.data_ptr()),
            *(places.buffer_info()[0], len(places) // 4, out.data_ptr()),
        )
        if status:
            raise MemoryError(f"No memory for the scores of {max(places[3::4]) + 1} tokens.")


class AttendKernel:
    """Attention alone, over keys and values that a cache holds. Shape legend: as of `AttentionKernel`."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scaling: float,
        sinks: Tensor | None,
        cache_dtype: torch.dtype,
    ) -> None:
        """Settings of one layer. sinks: fp32 ``[N]``, contiguous. Raises: ConfigError for head dims it lacks."""
        if head_dim % HEAD_DIM_STEP:
            raise ConfigError(f"The attention kernel takes no heads of {head_dim}.")
        self._sinks = sinks
        self._struct = AttentionStruct(
            sinks=optional_address(sinks),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scaling=scaling,
            cache_dtype=DTYPES[cache_dtype],
        )
        self._native = library().om_attend_rows

    def forward(self, queries: Tensor, rooms: Rooms, out: Tensor) -> None:
        """queries ``[T, N, D]`` -> out ``[T, N, D]``, fp32, contiguous; not checked.

        rooms: as of `AttentionKernel.step`, but they hold each row's key and value. Raises: MemoryError.
        """
        places = rooms_array(rooms)
        address = ctypes.addressof(self._struct)
        status = self._native(address, queries.data_ptr(), places.buffer_info()[0], len(places) // 4, out.data_ptr())
        if status:
            raise MemoryError(f"No memory for the scores of {max(places[3::4]) + 1} tokens.")


def optional_address(tensor: Tensor | None) -> int | None:
    """The address of a tensor; None for None."""
    return None if tensor is None else tensor.data_ptr()
