"""Matrices of a model as the card's kernels read them, and their launches.

T rows of activations, R rows that kernels are compiled for, O out features, K in features.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from offload_moe.card.launches import launch
from offload_moe.card.nodes import Nodes
from offload_moe.card.program import Program
from offload_moe.card.structs import struct
from offload_moe.decode.dense import NarrowLinear, QuantLinear, number_linear
from offload_moe.errors import DevicePassUnavailable
from offload_moe.native.constants import CODECS, GGUF_BLOCKS, GGUF_NUMBERS, GGUF_SUPERBLOCKS
from offload_moe.native.kernels import Linear
from offload_moe.native.planes import VALUES, codec_name
from offload_moe.native.structs import MatrixStruct
from offload_moe.quant.gguf import PREFIX, parse_gguf
from offload_moe.quant.gguf_device import ON_DEVICE

MOST_MATRICES = 4  # of one launch
Inputs = Mapping[str, Any]  # codec of the activations -> `om_card_input`
KERNELS = {"nf4", "int8", "mxfp4", *VALUES, *map(codec_name, ON_DEVICE)}  # codecs of matrices that have some
TABLES = ("q8_0", "q4_k", "q6_k")  # types of GGUF in which rows of an embedding are read
_NAMES = {number: name for name, number in (CODECS | GGUF_NUMBERS | GGUF_BLOCKS | GGUF_SUPERBLOCKS).items()}


class Keeper:
    """Tensors that the card reads: they stay alive as long as this object."""

    def __init__(self) -> None:
        self._kept: list[object] = []

    def keep(self, value: object) -> None:
        self._kept.append(value)

    def numbers(self, tensor: Tensor | None) -> int:
        """The address of a tensor's numbers in fp32, or 0."""
        if tensor is None:
            return 0
        values = tensor.detach().float().contiguous()
        self.keep(values)
        return values.data_ptr()

    def address(self, tensor: Tensor) -> int:
        """The address of a tensor as it is."""
        assert tensor.is_contiguous()
        self.keep(tensor)
        return tensor.data_ptr()


def linear_of(module: nn.Module) -> Linear:
    """A projection. Raises: DevicePassUnavailable."""
    if isinstance(module, QuantLinear):
        if not module.in_panels:
            raise DevicePassUnavailable(f"dense weights in the codec {module.codec.name} have no kernel there")
        linear = module.as_projection()
        kernel_codec(linear.struct(), "dense weights")
        return linear
    if isinstance(module, nn.Linear | NarrowLinear):
        return number_linear(module.weight.detach(), module.bias)
    raise DevicePassUnavailable(f"a projection that is a {type(module).__name__}")


def out_features(linear: Linear) -> int:
    return linear.shape.matrices[0].out_features


def in_features(linear: Linear) -> int:
    return linear.shape.matrices[0].in_features


def codecs_of(linears: Iterable[Linear]) -> set[str]:
    """Those of activations that have to be quantized."""
    return {input_codec(linear.codec) for linear in linears} - set(VALUES)


def input_codec(codec: str) -> str:
    """The codec whose activations a matrix takes: GGUF's types take those of int8."""
    return "int8" if codec.startswith(PREFIX) else codec


def has_kernel(kind: str, *, is_table: bool = False) -> bool:
    """Whether a card computes with matrices of a type of GGUF, or reads an embedding in it."""
    return kind.lower() in TABLES if is_table else kind in ON_DEVICE


def why_no_experts(codec: str, *, has_gate: bool) -> str:
    """What of experts in GGUF's types has no kernel on a card; empty where all has, and for other codecs."""
    found = parse_gguf(codec)
    if found is None:
        return ""
    if not all(has_kernel(kind.name) for kind in found.kinds):
        return f"experts in {codec}"
    if has_gate and found.kinds[0] != found.kinds[1]:
        return f"experts in {codec}, whose gate and up rows have different types"
    return ""


def kernel_codec(matrix: MatrixStruct, what: str) -> str:
    """The codec of a matrix by its name in the kernels. Raises: DevicePassUnavailable where there is no kernel."""
    name = _NAMES[matrix.codec]
    if name not in KERNELS:
        raise DevicePassUnavailable(f"{what} in GGUF's type {name.upper()} have no kernel there")
    return f"OM_{name.upper()}"


def inputs_array(inputs: Inputs) -> Any:
    """`om_card_input[3]`, by codec of activations."""
    array = (struct("input") * 3)()
    for codec, value in inputs.items():
        array[CODECS[codec]] = value
    return array


def card_matrix(matrix: MatrixStruct) -> Any:
    """`om_card_matrix`."""
    names = ("codes", "scales", "nested_scales", "nested_offset", "bias", "bias_dtype", "rows")
    return struct("matrix")(**{name: getattr(matrix, name) for name in names})


def add_linears(
    nodes: Nodes,
    program: Program,
    keeper: Keeper,
    linears: Sequence[tuple[Linear, int]],
    *,
    state: Any,
    inputs: Inputs,
    x: int,
    rows: int,
) -> None:
    """Multiply the same activations with several matrices, each into an address ``[T, O]`` of fp32.

    inputs, x: the activations quantized, and as they are. state: `om_card_pass`.
    """
    ordered = sorted(linears, key=lambda pair: pair[0].codec)
    for codec, group in groupby(ordered, key=lambda pair: pair[0].codec):
        members = list(group)
        for first in range(0, len(members), MOST_MATRICES):
            _add(nodes, program, keeper, codec, members[first : first + MOST_MATRICES], state, inputs, x, rows)


def _add(
    nodes: Nodes,
    program: Program,
    keeper: Keeper,
    codec: str,
    members: Sequence[tuple[Linear, int]],
    state: Any,
    inputs: Inputs,
    x: int,
    rows: int,
) -> None:
    columns, is_plain = in_features(members[0][0]), codec in VALUES
    params = struct("linear_params")(**{"pass": state}, x=x, num_matrices=len(members))
    if not is_plain:
        params.input = inputs[input_codec(codec)]
    number_of_codec, num_blocks = members[0][0].struct().codec, 0
    for number, (linear, out) in enumerate(members):
        params.matrices[number] = card_matrix(linear.struct())
        params.records[number] = keeper.address(linear.record)
        params.biases[number] = keeper.numbers(linear.bias)
        params.outs[number] = out
        sizes = (out_features(linear),) if is_plain else (number_of_codec, out_features(linear), columns)
        num_blocks += launch("OM_VALUES_BLOCKS" if is_plain else "OM_LINEAR_BLOCKS", *sizes)
    name = kernel_codec(members[0][0].struct(), "dense weights")
    kernel = program.kernel("VALUES" if is_plain else "LINEAR", name, columns, rows)
    threads = launch("OM_VALUES_THREADS") if is_plain else launch("OM_LINEAR_THREADS", number_of_codec, columns, rows)
    nodes.add(kernel, params, threads=threads, grid=(num_blocks,))


def plain_weight(module: nn.Module) -> tuple[str, Tensor]:
    """The codec and the numbers of a projection that is not quantized. Raises: DevicePassUnavailable."""
    linear = linear_of(module)
    if linear.codec not in VALUES:
        raise DevicePassUnavailable("latents whose expansion is quantized")
    assert linear.record.dtype in (torch.bfloat16, torch.float32)
    return linear.codec, linear.record
