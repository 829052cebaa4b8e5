"""The native call of a gated MLP that every token takes: a dense one, or a shared expert."""

import ctypes

from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.attention import Linear
from offload_moe.native.bindings import library
from offload_moe.native.constants import ACTIVATIONS
from offload_moe.native.planes import DTYPES, check_rows, shares_inputs
from offload_moe.native.structs import MatrixStruct, MlpStruct


class MlpKernel:
    """``down(activation(gate(x)) * up(x))``, with the operations of an expert. Shape legend: T tokens, H hidden."""

    def __init__(self, gate: Linear, up: Linear, down: Linear, *, activation: str) -> None:
        """The records are read where they lie. Raises: ConfigError for linears that are not computed together."""
        linears = (gate, up, down)
        first, second, last = (linear.shape.matrices[0] for linear in linears)
        if (first.out_features, first.in_features) != (second.out_features, second.in_features) or (
            last.in_features != first.out_features
        ):
            raise ConfigError(f"Matrices {first}, {second} and {last} are no gated MLP.")
        if not shares_inputs((gate.codec, up.codec)) or len({linear.in_panels for linear in linears}) > 1:
            raise ConfigError("The matrices of a gated MLP have several codecs, or orders of rows.")
        if any(linear.bias is not None for linear in linears):
            raise ConfigError("The MLP kernel takes biases that are in the records.")
        self.hidden = last.out_features
        self._owned = linears
        self._struct = MlpStruct(
            matrices=(MatrixStruct * 3)(*(linear.struct() for linear in linears)),
            records=(ctypes.c_void_p * 3)(*(linear.record.data_ptr() for linear in linears)),
            activation=ACTIVATIONS[activation],
        )
        self.struct_address = ctypes.addressof(self._struct)
        self._native = library().om_mlp_forward

    def forward(self, x: Tensor, out: Tensor) -> None:
        """Compute x ``[T, H]`` -> out ``[T, H]``, each fp32 or bf16, contiguous. Raises: ConfigError, MemoryError."""
        check_rows("x", x, self.hidden)
        check_rows("out", out, self.hidden)
        if x.shape != out.shape:
            raise ConfigError(f"out is {tuple(out.shape)}, x {tuple(x.shape)}.")
        status = self._native(
            self.struct_address, x.data_ptr(), len(x), DTYPES[x.dtype], out.data_ptr(), DTYPES[out.dtype]
        )
        if status:
            raise MemoryError(f"No memory for the intermediate activations of {len(x)} tokens.")
