"""The launches of a gated MLP that every row takes: a dense layer's, or a shared expert.

T rows, H hidden, I intermediate.
"""

from typing import Any

from torch import nn

from offload_moe.card.frame import Frame
from offload_moe.card.launches import launch
from offload_moe.card.linears import (
    Inputs,
    card_matrix,
    codecs_of,
    in_features,
    input_codec,
    kernel_codec,
    linear_of,
    out_features,
)
from offload_moe.card.nodes import Nodes
from offload_moe.card.structs import struct
from offload_moe.decode.mlp import FusedMLP
from offload_moe.errors import DevicePassUnavailable
from offload_moe.families.layer_spec import MLPSpec
from offload_moe.native.kernels import Linear
from offload_moe.native.planes import VALUES

ACTIVATIONS = {"silu": "SILU", "gelu": "GELU", "gelu_pytorch_tanh": "GELU_TANH", "gelu_tanh": "GELU_TANH"}


class Mlp:
    """Three projections, all quantized or all of plain numbers.

    is_plain: of plain numbers. codecs: of the quantized activations that it takes.
    """

    def __init__(self, layer: nn.Module, spec: MLPSpec) -> None:
        """Of the layer's MLP. Raises: DevicePassUnavailable where a part has no kernel."""
        activation, self._gate, self._up, self._down = _parts(layer, spec)
        linears = self._gate, self._up, self._down
        self.is_plain = self._gate.codec in VALUES
        self.codecs = codecs_of([self._gate])
        if self._up.codec != self._gate.codec or (self._down.codec in VALUES) != self.is_plain:
            raise DevicePassUnavailable("dense MLPs or shared experts in several codecs have no kernel there")
        if any(linear.bias is not None for linear in linears):
            raise DevicePassUnavailable("dense MLPs or shared experts with biases have no kernel there")
        if activation not in ACTIVATIONS:
            raise DevicePassUnavailable(f"the activation {activation} of a dense MLP has no kernel there")
        self._activation = f"OM_{ACTIVATIONS[activation]}"
        what = "dense MLPs or shared experts"
        self._kernel_codecs = [kernel_codec(linear.struct(), what) for linear in (self._gate, self._down)]

    def add(
        self,
        nodes: Nodes,
        frame: Frame,
        inputs: Inputs,
        x: int,
        *,
        out: int,
        stride: int,
        shares: int,
        after: tuple[int, ...] | None = None,
    ) -> None:
        """Into rows of `out` at distances of `stride` rows. inputs, x: the activations quantized, and as they are."""
        rows, hidden, inner = frame.rows, in_features(self._gate), out_features(self._gate)
        if self.is_plain:
            between: Any = frame.floats("mlp values", inner)
            first, kinds = struct("values_first_params")(x=x), ("VALUES_FIRST", "VALUES_SECOND")
            second = struct("values_second_params")(x=between)
            codecs = self._kernel_codecs[:1]
            launches = [(launch("OM_VALUES_THREADS"), launch("OM_VALUES_BLOCKS", width)) for width in (inner, hidden)]
        else:
            between = frame.scratch.input("mlp", rows, inner)
            first = struct("mlp_first_params")(input=inputs[input_codec(self._gate.codec)])
            second, kinds = struct("mlp_second_params")(hidden=between), ("MLP_FIRST", "MLP_SECOND")
            codecs, (gate, down) = self._kernel_codecs, (self._gate.struct().codec, self._down.struct().codec)
            launches = [
                (launch("OM_FIRST_THREADS", gate, hidden, rows, 1), launch("OM_FIRST_BLOCKS", inner)),
                (launch("OM_SECOND_THREADS", down, inner, rows), launch("OM_SECOND_BLOCKS", down, hidden, inner)),
            ]
        setattr(first, "pass", frame.base)
        setattr(second, "pass", frame.base)
        first.hidden = between
        for number, linear in enumerate((self._gate, self._up)):
            first.matrices[number], first.records[number] = _placed(frame, linear)
        second.matrix, second.record = _placed(frame, self._down)
        second.shares, second.out, second.stride = shares, out, stride
        names = (
            frame.program.kernel(kinds[0], *codecs, hidden, inner, rows, self._activation),
            frame.program.kernel(kinds[1], self._kernel_codecs[1], inner, hidden, rows),
        )
        for name, params, (threads, blocks), behind in zip(
            names, (first, second), launches, (after, None), strict=True
        ):
            nodes.add(name, params, threads=threads, grid=(blocks,), after=behind)


def _placed(frame: Frame, linear: Linear) -> tuple[Any, int]:
    """The matrix, and the address of its record."""
    return card_matrix(linear.struct()), frame.keeper.address(linear.record)


def _parts(layer: nn.Module, spec: MLPSpec) -> tuple[str, Linear, Linear, Linear]:
    """The activation, and the projections gate, up and down. Raises: DevicePassUnavailable."""
    module = layer.get_submodule(spec.gate.rpartition(".")[0])
    if isinstance(module, FusedMLP):
        return module.activation, *module.projections
    if spec.gate == spec.up:
        raise DevicePassUnavailable("dense MLPs whose gate and up rows are one matrix have no kernel there")
    gate, up, down = (linear_of(layer.get_submodule(path)) for path in (spec.gate, spec.up, spec.down))
    return spec.activation, gate, up, down
