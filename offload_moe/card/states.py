"""Where the card finds the states of linear attention: the only ones of a sequence, or places of a ring.

A row reads one place and leaves another, or the same one: two numbers for all layers, which are edits of a pass. So a
pass whose last tokens may be taken back costs no synchronization.
"""

import ctypes
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from offload_moe.card.memory import Allocate, write
from offload_moe.card.model import DecoderParts
from offload_moe.card.structs import struct
from offload_moe.decode.states import StatesLayer
from offload_moe.families.layer_spec import AttentionSpec
from offload_moe.native.constants import MAX_ROWS

Memory = list[tuple[Tensor, Tensor]]  # of each layer, all places: inputs of the convolution and states


class States:
    """The states of all layers that have them, for the rows of the next pass."""

    def __init__(self, parts: DecoderParts, allocate: Allocate) -> None:
        self._layers = [index for index, layer in enumerate(parts.layers) if layer.spec.attention.delta is not None]
        self._size = ctypes.sizeof(struct("states"))
        self._described = (struct("states") * (len(self._layers) * MAX_ROWS))()  # rows of a layer beside each other
        self._structs = allocate(max(ctypes.sizeof(self._described), self._size))
        self._now: dict[int, Memory] = {}  # by cache of the rows of the next pass
        self._held: dict[int, Memory] = {}  # by cache of the rows that are described

    def address(self, layer: int) -> int:
        """Of what a layer's kernel reads; 0 where it has no states."""
        if layer not in self._layers:
            return 0
        return self._structs.data_ptr() + self._layers.index(layer) * MAX_ROWS * self._size

    def moves(self, caches: Sequence[Any]) -> list[tuple[int, int]]:
        """Of each row the place that it reads and the one that it leaves; none where no layer has states.

        Before the rows are counted. caches: of each row.
        """
        self._now = {}
        moves: list[tuple[int, int]] = []
        for cache, group in groupby(caches, key=id) if self._layers else ():
            rows = list(group)
            layers = self._of(rows[0])
            self._now[cache] = _agreeing(layers)
            moves += pairwise(layers[0].next_places(len(rows)))
        return moves

    def takes(self, cache: Any, specs: Sequence[AttentionSpec]) -> bool:
        """Whether a sequence has states that the kernels move on. specs: of all layers."""
        pairs = zip(self._of(cache), (specs[index] for index in self._layers), strict=True)
        return all(_takes(layer, spec) for layer, spec in pairs)

    def are_described(self, cache: int) -> bool:
        """Whether the card has the memory of a sequence of the next pass, by the id of its cache."""
        now, held = (found.get(cache, []) for found in (self._now, self._held))
        return len(now) == len(held) and all(a[0] is b[0] and a[1] is b[1] for a, b in zip(now, held, strict=True))

    def describe(self, rows: Sequence[int]) -> None:
        """Write where the states of rows are, by the ids of their caches; no pass may be under way."""
        if not self._layers:
            return
        self._held = self._now
        for row, cache in enumerate(rows):
            for at, (inputs, state) in enumerate(self._held[cache]):
                place = struct("states")(inputs=inputs.data_ptr(), state=state.data_ptr())
                self._described[at * MAX_ROWS + row] = place
        write(self._structs, self._described)

    def forget(self) -> None:
        """Something else may have changed the caches."""
        self._held = {}

    def _of(self, cache: Any) -> list[Any]:
        return [cache.layers[index] for index in self._layers]


def give_back(cache: Any) -> None:
    """Let modules read the states of a sequence: in the dtype that they had of them."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, StatesLayer) and layer.dtype is not None:
            layer.keep_in(layer.dtype)


def _agreeing(layers: Sequence[StatesLayer]) -> Memory:
    """Where their states are: at the same place of their rings, in fp32."""
    for layer in layers:
        layer.keep_in(torch.float32)
    found = [layer.memory() for layer in layers]
    if len({place for *_, place in found}) > 1:  # other code has replaced some of them
        for layer in layers:
            layer.gather()
        found = [layer.memory() for layer in layers]
    return [(inputs, state) for inputs, state, _ in found]


def _takes(layer: Any, spec: AttentionSpec) -> bool:
    assert spec.delta is not None
    if type(layer) is not StatesLayer or layer.record_past or not layer.has_previous_state[0]:
        return False
    inputs, state = layer.conv_states[0], layer.recurrent_states[0]
    if inputs is None or state is None or not (inputs.is_contiguous() and state.is_contiguous()):
        return False
    sizes = 1, spec.num_heads, spec.head_dim, spec.delta.value_dims
    return state.shape == sizes and state.dtype == torch.float32 and inputs.shape[2] == spec.delta.num_taps
