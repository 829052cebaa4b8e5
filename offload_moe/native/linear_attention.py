"""The native call of linear attention."""

import ctypes
from array import array
from collections.abc import Iterable, Sequence

from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native.attention import Linear
from offload_moe.native.bindings import library
from offload_moe.native.delta import DeltaKernel
from offload_moe.native.structs import LinearAttentionStruct, MatrixStruct

States = tuple[Tensor, Tensor]  # the inputs of a convolution [N, taps], and a rule's state [H, K, V]


def state_places(inputs: Tensor, state: Tensor, moves: Iterable[tuple[int, int]]) -> list[int]:
    """The fields of the `om_room` of some rows of a sequence.

    inputs, state: States, or several of each. moves: of each row, which of them it reads and which it leaves.
    """
    addresses = inputs.data_ptr(), state.data_ptr()
    return [field for move in moves for field in (*addresses, *move)]


class LinearAttentionKernel:
    """Projections, a gated delta rule and the output projection of some tokens, in fp32.

    Each row's bits are those of a call of it alone. T rows; others as in `DeltaKernel`.
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

    def step(self, x: Tensor, states: Sequence[States], out: Tensor) -> None:
        """x ``[T, hidden]`` -> out ``[T, hidden]``, fp32, contiguous; not checked.

        states: of the sequence of each row, which are moved on. Raises: MemoryError.
        """
        rooms = array("q", (field for each in states for field in state_places(*each, [(0, 0)])))
        address = rooms.buffer_info()[0]
        if self._native(self.struct_address, x.data_ptr(), address, len(states), out.data_ptr()):
            raise MemoryError("No memory for the projections of linear attention.")
