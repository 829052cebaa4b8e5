"""A native call: a token in a layer of gated delta rules, behind its projections.

H heads of values, G heads of keys, K and V their dims, N channels: 2 G K + H V.
"""

import ctypes
from dataclasses import dataclass

from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.bindings import library
from offload_moe.native.constants import MAX_DELTA_DIM
from offload_moe.native.structs import DeltaInputsStruct, DeltaStruct

DIM_STEP = 16  # dims are multiples of the widest vector


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
        layer, number = self._struct, 4  # bytes of one
        shared, keys = layer.num_heads // layer.num_key_heads, layer.num_key_heads * layer.key_dim
        values = shared * layer.value_dim
        mixed, strengths = projected.mixed.data_ptr(), projected.strengths.data_ptr()
        if projected.gates is None:
            first_value, width = mixed + 2 * layer.key_dim * number, 2 * layer.key_dim + 2 * values
            places = (mixed, mixed + layer.key_dim * number, first_value, first_value + values * number)
            strides = [width, width, width]
        else:
            places = (mixed, mixed + keys * number, mixed + 2 * keys * number, projected.gates.data_ptr())
            strides = [layer.key_dim, values, values]
        is_joined = projected.times is None
        times = strengths + shared * number if projected.times is None else projected.times.data_ptr()
        strides.append(2 * shared if is_joined else shared)
        return DeltaInputsStruct(*places, strengths, times, (ctypes.c_int64 * 4)(*strides))
