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


class _Places(NamedTuple):
    """Numbers from the beginning of their tensor to the first key, value and gate.

    strides: to queries and keys, values, and gates of the next head of keys.
    """

    keys: int
    values: int
    gates: int
    strides: tuple[int, int, int]


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
        shared, keys = num_heads // num_key_heads, num_key_heads * key_dim
        values, together = shared * value_dim, 2 * key_dim + 2 * shared * value_dim
        self._joined = _Places(key_dim, 2 * key_dim, 2 * key_dim + values, (together, together, together))
        self._apart = _Places(keys, 2 * keys, 0, (key_dim, values, values))
        self._num_shared = shared

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
        gates, times = projected.gates, projected.times
        places = self._joined if gates is None else self._apart
        mixed, strengths = projected.mixed.data_ptr(), projected.strengths.data_ptr()
        first_gate = mixed if gates is None else gates.data_ptr()
        return DeltaInputsStruct(
            queries=mixed,
            keys=mixed + FLOAT * places.keys,
            values=mixed + FLOAT * places.values,
            gates=first_gate + FLOAT * places.gates,
            strengths=strengths,
            times=strengths + FLOAT * self._num_shared if times is None else times.data_ptr(),
            strides=(*places.strides, self._num_shared * (1 if times is not None else 2)),
        )
