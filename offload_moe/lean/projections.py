"""The query, key and value of one token per sequence, with one kernel call where their records allow it.

Shapes: B batch, H hidden, N query heads, M key/value heads, D head dim.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from offload_moe import kernels
from offload_moe.dense import QuantLinear

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

    def __init__(self, linears: list[QuantLinear]) -> None:
        self._linears = linears
        self._sizes = [linear.out_features for linear in linears]
        self._kernel = kernels.LinearKernel(
            linears[0].codec.name,
            [linear.shape for linear in linears],
            [linear.codec.layout(linear.shape) for linear in linears],
        )

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden_states[:, 0].contiguous()
        q, k, v = rows.new_empty(len(rows) * sum(self._sizes)).split([len(rows) * size for size in self._sizes])
        outs = [out.view(len(rows), size) for out, size in zip((q, k, v), self._sizes, strict=True)]
        self._kernel.forward(rows, [linear.record for linear in self._linears], outs, mode=self._linears[0].mode)
        for out, linear in zip(outs, self._linears, strict=True):
            if linear.bias is not None:
                out += linear.bias
        return outs[0], outs[1], outs[2]


def joint_or_separate(attention: nn.Module) -> Projections:
    """The cheapest way to the query, key and value of this module."""
    linears = [getattr(attention, name) for name in NAMES]
    if all(isinstance(linear, QuantLinear) and linear.has_kernel for linear in linears):
        first = linears[0]
        if all(linear.codec is first.codec and linear.mode == first.mode for linear in linears):
            return JointProjections(linears)
    return SeparateProjections(attention)
