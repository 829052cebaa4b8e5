"""A native call: a token in a layer of gated delta rules, behind its projections.

H heads of values, G heads of keys, K and V their dims, N channels: 2 G K + H V.
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.bindings import library
from offload_moe.native.constants import DIM_STEP, MAX_DELTA_DIM
from offload_moe.native.structs import DeltaInputsStruct, DeltaStruct

FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Projected:
    """A token's projections, fp32: in one tensor by heads of keys, or apart.

    mixed: ``[N + H V]``, of each head of keys its query, its key, values and gates of the heads that share it; or
    ``[N]``, all queries, then keys, then values. gates: ``[H V]``, None where they are in `mixed`. strengths, times:
    ``[H]``; where `times` is None ``[2 H]``, of each head of keys the strengths, then the times.
    """

    mixed: Tensor
    strengths: Tensor
    gates: Tensor | None = None
    times: Tensor | None = None


class Places(NamedTuple):
    """Where a token's queries, keys, values, gates, strengths and times are among its projections.

    sources: which projection has them; offsets: the first number of them there. strides: numbers to those of the next
    head of keys: queries and keys, values, gates, strengths and times.
    """

    sources: tuple[int, ...]
    offsets: tuple[int, ...]
    strides: tuple[int, int, int, int]


def places_of(*, num_heads: int, num_key_heads: int, key_dim: int, value_dim: int, is_joined: bool) -> Places:
    """Of two projections, by heads of keys: `mixed` and `strengths`; or of four: with `gates` and `times` apart."""
    shared, keys = num_heads // num_key_heads, num_key_heads * key_dim
    values, together = shared * value_dim, 2 * key_dim + 2 * shared * value_dim
    if is_joined:
        offsets = (0, key_dim, 2 * key_dim, 2 * key_dim + values, 0, shared)
        return Places((0, 0, 0, 0, 1, 1), offsets, (together, together, together, 2 * shared))
    return Places((0, 0, 0, 1, 2, 3), (0, keys, 2 * keys, 0, 0, 0), (key_dim, values, values, shared))


class DeltaKernel:
    """Convolution, decay, delta rule and gated norm of one token, in fp32."""

    def __init__(
        self,
        *,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        decays: Tensor,
        time_biases: Tensor,
        norm: Tensor,
        num_key_heads: int,
        key_dim: int,
        epsilon: float,
    ) -> None:
        """All fp32, contiguous, on the CPU.

        conv_weight: ``[N, taps]``; conv_bias: ``[N]``; decays: ``[H]``, negative; time_biases: ``[H]``; norm: ``[V]``.

        Raises:
            ConfigError: a dim that the kernel does not take.
        """
        num_heads, value_dim = len(decays), len(norm)
        for dim in (key_dim, value_dim):
            if dim % DIM_STEP or not 0 < dim <= MAX_DELTA_DIM:
                raise ConfigError(
                    f"The kernel takes heads of {DIM_STEP} to {MAX_DELTA_DIM} dims in steps of {DIM_STEP}, not {dim}."
                )
        if num_heads % num_key_heads or len(conv_weight) != 2 * num_key_heads * key_dim + num_heads * value_dim:
            raise ConfigError(f"{num_heads} heads of values and {num_key_heads} of keys do not fit the convolution.")
        self._kept = (conv_weight, conv_bias, decays, time_biases, norm)
        self._struct = DeltaStruct(
            conv_weight=conv_weight.data_ptr(),
            conv_bias=None if conv_bias is None else conv_bias.data_ptr(),
            decays=decays.data_ptr(),
            time_biases=time_biases.data_ptr(),
            norm=norm.data_ptr(),
            num_heads=num_heads,
            num_key_heads=num_key_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            conv_length=conv_weight.shape[1],
            epsilon=epsilon,
        )
        self._native = library().om_delta_step
        sizes = {"num_heads": num_heads, "num_key_heads": num_key_heads, "key_dim": key_dim, "value_dim": value_dim}
        self._joined, self._apart = (places_of(**sizes, is_joined=is_joined) for is_joined in (True, False))

    @property
    def struct(self) -> DeltaStruct:
        """As calls of more than this read it."""
        return self._struct

    def places(self, num_projections: int) -> Places:
        """Of two projections, by heads of keys: `mixed` and `strengths`; or of four: with `gates` and `times` apart."""
        return self._joined if num_projections == 2 else self._apart

    def step(self, projected: Projected, inputs: Tensor, state: Tensor, out: Tensor) -> None:
        """Move the states on by a token: inputs ``[N, taps]`` and state ``[H, K, V]``; set `out` ``[H V]``.

        All fp32 and contiguous; not checked, this is the hot path.
        """
        struct = self._inputs(projected)
        self._native(
            ctypes.addressof(self._struct),
            ctypes.addressof(struct),
            inputs.data_ptr(),
            state.data_ptr(),
            out.data_ptr(),
        )

    def _inputs(self, projected: Projected) -> DeltaInputsStruct:
        tensors = (projected.mixed, projected.gates, projected.strengths, projected.times)
        addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
        sources, offsets, strides = self.places(len(addresses))
        fields = (addresses[source] + FLOAT * offset for source, offset in zip(sources, offsets, strict=True))
        return DeltaInputsStruct(*fields, strides)
