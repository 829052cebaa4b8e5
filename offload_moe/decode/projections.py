"""The query, key and value of one token per sequence, with one kernel call where their records allow it.

Shapes: B batch, H hidden, N query heads, M key/value heads, D head dim.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from offload_moe.decode.dense import QuantLinear
from offload_moe.decode.hooks import Forwards, are_watched, hooks_of
from offload_moe.native import kernels

NAMES = ("q_proj", "k_proj", "v_proj")


class Projections(Protocol):
    """hidden ``[B, 1, H]`` -> query ``[B, N * D]``, key and value ``[B, M * D]``."""

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class SeparateProjections:
    """The modules as they are."""

    def __init__(self, attention: Any) -> None:
        self._linears = tuple(getattr(attention, name) for name in NAMES)

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden_states[:, 0]
        q, k, v = self._linears
        return q(rows), k(rows), v(rows)


class JointProjections:
    """One call for three records. For one sequence the results lie in one buffer: query, key, value."""

    def __init__(self, linears: list[QuantLinear], watched: SeparateProjections) -> None:
        """watched: takes the calls while a linear has a hook or another forward."""
        self._linears = linears
        self._hooks, self._forwards, self._watched = hooks_of(linears), Forwards(linears), watched
        self._records = [linear.record for linear in linears]
        self._sizes = [linear.out_features for linear in linears]
        self._has_bias = any(linear.bias is not None for linear in linears)
        self._kernel = kernels.LinearKernel(
            [linear.codec.name for linear in linears],
            [linear.shape for linear in linears],
            [linear.codec.layout(linear.shape) for linear in linears],
            num_parts=int(linears[0].in_panels),
        )

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if are_watched(self._hooks) or not self._forwards.are_kept:
            return self._watched(hidden_states)
        rows = hidden_states[:, 0].contiguous()
        if rows.shape[0] == 1:
            out = rows.new_empty(1, sum(self._sizes))
            self._kernel.forward_row(rows, self._records, out)
            q, k, v = out.split(self._sizes, dim=1)
        else:
            q, k, v = (rows.new_empty(rows.shape[0], size) for size in self._sizes)
            self._kernel.forward(rows, self._records, (q, k, v))
        if self._has_bias:
            for each, linear in zip((q, k, v), self._linears, strict=True):
                if linear.bias is not None:
                    each += linear.bias
        return q, k, v


def joint_or_separate(attention: nn.Module) -> Projections:
    """The cheapest way to the query, key and value of this module."""
    linears, separate = [getattr(attention, name) for name in NAMES], SeparateProjections(attention)
    if all(isinstance(linear, QuantLinear) and linear.has_kernel for linear in linears):
        first = linears[0]
        if kernels.shares_inputs(linear.codec.name for linear in linears) and all(
            linear.in_panels == first.in_panels for linear in linears
        ):
            return JointProjections(linears, separate)
    return separate
