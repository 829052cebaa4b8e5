"""Linear attention of some rows, by the card's kernel in the shim and by the library, one row after the other.

T rows, G heads of keys, S heads of values for each, K and V their dims, N channels, L taps.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from offload_moe.card.launches import launch
from offload_moe.native import kernels
from tests.support.cuda import shim
from tests.support.cuda.attention import Inputs, Pass, array, load
from tests.support.cuda.bits import Floats, address, are_same, random_floats
from tests.support.cuda.card import copied
from tests.support.cuda.pages import STRUCTS

EPSILON = 1e-6
NUM_PLACES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """is_joined: one projection gives queries, keys, values and gates by heads of keys, another strengths and times."""

    num_key_heads: int
    num_shared: int
    key_dim: int
    value_dim: int
    num_taps: int = 4
    is_joined: bool = True
    has_bias: bool = False

    @property
    def num_heads(self) -> int:
        return self.num_key_heads * self.num_shared

    @property
    def num_values(self) -> int:
        return self.num_heads * self.value_dim

    @property
    def num_channels(self) -> int:
        return 2 * self.num_key_heads * self.key_dim + self.num_values

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the projections."""
        if self.is_joined:
            return self.num_channels + self.num_values, 2 * self.num_heads
        return self.num_channels, self.num_values, self.num_heads, self.num_heads

    @property
    def name(self) -> str:
        return "_".join(["om_delta", *map(str, astuple(self))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Rows of one sequence: of each, the place that it reads and the one that it leaves."""

    places: Sequence[tuple[int, int]]


@cache
def program(all_sizes: tuple[Sizes, ...]) -> shim.ShimLibrary:
    lines = [
        f"OM_DEFINE_DELTA({s.name}, {s.num_key_heads}, {s.num_shared}, {s.key_dim}, {s.value_dim}, {s.num_taps})"
        for s in all_sizes
    ]
    return load("delta.cuh", list(dict.fromkeys(lines)))


class DeltaCase:
    """One launch for rows of some sequences."""

    def __init__(
        self,
        sizes: Sizes,
        sequences: Sequence[Moves],
        seed: int = 0,
        *,
        num_special: int = 0,
        scales: tuple[float, float] = (1.0, 3.0),
    ) -> None:
        """num_special: NaN, infinite, zero, tiny or huge numbers, in a fourth of all arrays.

        scales: of decays and time biases.
        """
        self.sizes, self.random, self._num_special = sizes, np.random.default_rng(seed), num_special
        self.moves = [(at, *move) for at, sequence in enumerate(sequences) for move in sequence.places]
        self.num_rows = len(self.moves)
        heads, channels = sizes.num_heads, sizes.num_channels
        self.conv_weight = self._floats(channels, sizes.num_taps)
        self.conv_bias = self._floats(channels) if sizes.has_bias else None
        self.decays = copied(-np.abs(self._floats(heads, scale=scales[0])))
        self.time_biases = self._floats(heads, scale=scales[1])
        self.norm = self._floats(sizes.value_dim) + 1
        self.projected = [self._floats(self.num_rows, width) for width in sizes.widths]
        rings = range(len(sequences) + 1)  # the last one is of a sequence that has no row
        self.inputs = [self._floats(NUM_PLACES, channels, sizes.num_taps) for _ in rings]
        self.states = [self._floats(NUM_PLACES, heads, sizes.key_dim, sizes.value_dim) for _ in rings]
        self.kernel = kernels.DeltaKernel(
            conv_weight=torch.from_numpy(self.conv_weight),
            conv_bias=None if self.conv_bias is None else torch.from_numpy(self.conv_bias),
            decays=torch.from_numpy(self.decays),
            time_biases=torch.from_numpy(self.time_biases),
            norm=torch.from_numpy(self.norm),
            num_key_heads=sizes.num_key_heads,
            key_dim=sizes.key_dim,
            epsilon=EPSILON,
        )

    def check(self, library: shim.ShimLibrary, *, seed: int = 0) -> Floats:
        """The library's bits, in results, int8, and every place of all states. Returns the results."""
        expected_inputs, expected_states = ([each.copy() for each in rings] for rings in (self.inputs, self.states))
        expected = np.stack([self._step(row, expected_inputs, expected_states) for row in range(self.num_rows)])
        out, inputs = self.run(library, seed=seed)
        with np.errstate(all="ignore"):
            assert are_same(out, expected), "results"
            assert inputs.are_those_of(out), "int8"
        for got, wanted in zip([*self.inputs, *self.states], [*expected_inputs, *expected_states], strict=True):
            assert are_same(got, wanted), "states"
        return out

    def run(self, library: shim.ShimLibrary, *, seed: int = 0, is_stopped: bool = False) -> tuple[Floats, Inputs]:
        """The result, and its int8 inputs."""
        sizes, given = self.sizes, Pass(self.num_rows, is_stopped=is_stopped)
        # behind the last row: more of its sequence, as in a pass, and of another one
        moves = [*self.moves, (self.moves[-1][0], 0, 1), (len(self.states) - 1, 0, 1)]
        out = np.full((len(moves), sizes.num_values), np.nan, np.float32)
        inputs = Inputs(len(moves), sizes.num_values)
        places = self.kernel.places(len(self.projected))
        rooms = [
            STRUCTS["om_card_states"](inputs=address(self.inputs[at]), state=address(self.states[at]))
            for at, _, _ in moves
        ]
        reads, leaves = (np.array([move[n] for move in moves], np.int32) for n in (1, 2))
        described = array("om_card_states", rooms)
        params = STRUCTS["om_card_delta_params"](
            **{"pass": given.struct},
            states=ctypes.addressof(described),
            reads=address(reads),
            leaves=address(leaves),
            projected=(ctypes.c_void_p * 6)(
                *(
                    self.projected[source].ctypes.data + 4 * offset
                    for source, offset in zip(places.sources, places.offsets, strict=True)
                )
            ),
            row_strides=(ctypes.c_int * 6)(*(self.projected[source].shape[1] for source in places.sources)),
            head_strides=(ctypes.c_int * 4)(*places.strides),
            conv_weight=address(self.conv_weight),
            conv_bias=address(self.conv_bias),
            decays=address(self.decays),
            time_biases=address(self.time_biases),
            norm=address(self.norm),
            out=address(out),
            inputs=array("om_card_input", inputs.structs),
            epsilon=EPSILON,
        )
        width = sizes.num_shared * sizes.value_dim
        grid = (launch("OM_DELTA_BLOCKS", sizes.num_key_heads, width), len(moves))
        library.launch(sizes.name, grid, (launch("OM_DELTA_THREADS", width),), params, seed=seed)
        assert np.isnan(out[self.num_rows :]).all()
        return out[: self.num_rows], inputs

    def _step(self, row: int, inputs: Sequence[Floats], states: Sequence[Floats]) -> Any:
        at, read, left = self.moves[row]
        window, state = (torch.from_numpy(rings[at][read].copy()) for rings in (inputs, states))
        out = torch.empty(self.sizes.num_values)
        mixed, *others = (torch.from_numpy(each[row].copy()) for each in self.projected)
        parts = dict(zip(("strengths",) if len(others) == 1 else ("gates", "strengths", "times"), others, strict=True))
        self.kernel.step(kernels.Projected(mixed=mixed, **parts), window, state, out)
        inputs[at][left], states[at][left] = window.numpy(), state.numpy()
        return out.numpy()

    def _floats(self, *shape: int, scale: float = 1.0) -> Floats:
        num_special = self._num_special if self.random.random() < 0.25 else 0
        return copied(random_floats(self.random, *shape, scale=scale, num_special=num_special)).reshape(shape)
