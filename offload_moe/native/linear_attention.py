"""The native call of linear attention."""

import ctypes
from collections.abc import Sequence

from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.attention import Linear
from offload_moe.native.bindings import library
from offload_moe.native.delta import DeltaKernel
from offload_moe.native.rooms import Rooms, rooms_array
from offload_moe.native.structs import LinearAttentionStruct, MatrixStruct


class LinearAttentionKernel:
    """Projections, a gated delta rule and the output projection of some tokens, in fp32.

    Each row's bits are those of a call of it alone. T rows, each of a sequence of its own; others as in `DeltaKernel`.
    """

    def __init__(self, rule: DeltaKernel, inputs: Sequence[Linear], output: Linear) -> None:
        """inputs: two projections or four, as of `DeltaKernel.places`. Raises: ConfigError for a bias."""
        linears = [*inputs, output]
        if any(linear.bias is not None or linear.shape.biases for linear in linears):
            raise ConfigError("The kernel of linear attention takes no biases.")
        self._owned = (rule, linears)
        places = rule.places(len(inputs))
        self._struct = LinearAttentionStruct(
            rule=rule.struct,
            inputs=(MatrixStruct * 4)(*(linear.struct() for linear in inputs)),
            records=(ctypes.c_void_p * 4)(*(linear.record.data_ptr() for linear in inputs)),
            num_inputs=len(inputs),
            output=output.struct(),
            output_record=output.record.data_ptr(),
            sources=places.sources,
            offsets=places.offsets,
            strides=places.strides,
        )
        self.struct_address = ctypes.addressof(self._struct)
        self._native = library().om_linear_attention_step

    def step(self, x: Tensor, rooms: Rooms, out: Tensor) -> None:
        """x ``[..., hidden]`` of T rows -> out ``[..., hidden]``, fp32, contiguous; not checked.

        rooms: of each row the inputs of its convolution ``[N, taps]`` and its state ``[H, K, V]``, which are moved on.
        Raises: MemoryError.
        """
        places = rooms_array(rooms)
        address, num_rows = places.buffer_info()[0], len(places) // 4
        if self._native(self.struct_address, x.data_ptr(), address, num_rows, out.data_ptr()):
            raise MemoryError("No memory for the projections of linear attention.")
