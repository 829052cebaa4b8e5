"""Attention of some rows, by the card's kernels in the shim and by the portable C.

T rows, N query heads, M key/value heads, D head dim; latent attention: K unrotated, P rotated and V value dims, Z rank.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.cuda import attention_reference as reference
from tests.support.cuda import shim
from tests.support.cuda.bits import Floats, address, are_same, from_bf16, random_floats, to_bf16
from tests.support.cuda.card import load_program
from tests.support.cuda.pages import STRUCTS, Cache, Sequence

NORMS = {
    "none": "OM_NO_NORM",
    "head": "OM_NORM_OF_HEAD",
    "all heads": "OM_NORM_OF_ALL",
    "rotated": "OM_NORM_OF_ROTATED",
}
NUM_POSITIONS = 1 << 13
EPSILON = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """Sizes of grouped-query attention. is_gated: a gate lies behind each query head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotated_dims: int
    rotation: str = "halves"
    norm_span: str = "none"
    is_gated: bool = False

    def lines(self, name: str) -> list[str]:
        """The kernels' definitions in a program."""
        n, m, d = self.num_heads, self.num_kv_heads, self.head_dim
        rotation, span = f"OM_{self.rotation.upper()}", NORMS[self.norm_span]
        return [
            f"OM_DEFINE_HEADS({name}_heads, {n}, {m}, {d}, {self.rotated_dims}, {rotation}, {span})",
            f"OM_DEFINE_ATTEND({name}_attend, {n}, {m}, {d}, 0, {d})",
            f"OM_DEFINE_MERGE({name}_merge, {n}, {d})",
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Sizes of latent attention. codec: of the expansion. max_rows: for how many it is compiled."""

    num_heads: int
    unrotated_dims: int
    rotated_dims: int
    value_dims: int
    rank: int
    rotation: str = "pairs"
    codec: str = "bf16"
    max_rows: int = 8

    def lines(self, name: str) -> list[str]:
        n, k, p, v, z = self.num_heads, self.unrotated_dims, self.rotated_dims, self.value_dims, self.rank
        codec, rotation = f"OM_{self.codec.upper()}", f"OM_{self.rotation.upper()}"
        return [
            f"OM_DEFINE_ABSORB({name}_absorb, {codec}, {n}, {k}, {p}, {v}, {z}, {rotation}, {self.max_rows})",
            f"OM_DEFINE_ATTEND({name}_attend, {n}, 1, {z}, {p}, {z})",
            f"OM_DEFINE_EXPAND({name}_expand, {codec}, {n}, {k}, {v}, {z}, {self.max_rows})",
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is attended to. num_special: NaN, infinite, zero, tiny or huge numbers, in a fourth of all arrays.

    query_scale: step and strength.
    """

    sequences: tuple[Sequence, ...]
    window: int = 0
    chunk: int = 0
    query_scale: tuple[float, float] = (0.0, 0.0)
    has_sinks: bool = False
    has_biases: bool = False
    is_one_room: bool = False
    num_special: int = 0
    scaling: float = 0.09

    @property
    def num_rows(self) -> int:
        return sum(sequence.num_rows for sequence in self.sequences)


def name_of(shape: Grouped | Latent) -> str:
    return "_".join(["om", type(shape).__name__, *(str(value).replace(" ", "_") for value in astuple(shape))])


@cache
def program(shapes: tuple[Grouped | Latent, ...]) -> shim.ShimLibrary:
    """The kernels of these shapes."""
    lines = [line for shape in shapes for line in shape.lines(name_of(shape))]
    return load("attention.cuh", lines)


def load(header: str, lines: Iterable[str]) -> shim.ShimLibrary:
    text = "\n".join([f'#include "{header}"', *lines, ""])
    return load_program(text)


class Pass:
    """Device memory that all kernels of a pass read."""

    def __init__(self, num_rows: int, *, is_stopped: bool = False) -> None:
        self.stop, self.num_rows = np.array([int(is_stopped)], np.int32), np.array([num_rows], np.int32)

    @property
    def struct(self) -> ctypes.Structure:
        return STRUCTS["om_card_pass"](stop=address(self.stop), num_rows=address(self.num_rows))


class Attended:
    """Scratch memory between kernels, full of NaNs."""

    def __init__(self, num_rows: int, num_heads: int, capacity: int, dims: int) -> None:
        self.sections = np.full(num_rows * num_heads * capacity * 2, np.nan, np.float32)
        self.sums = np.full(num_rows * num_heads * capacity * dims, np.nan, np.float32)
        self.struct = STRUCTS["om_card_attended"](
            sections=address(self.sections), sums=address(self.sums), capacity=capacity
        )


class Inputs:
    """Where a kernel puts int8 activations, by codec."""

    def __init__(self, num_rows: int, columns: int) -> None:
        blocks = -(-columns // 64)
        self.quants = [np.full((num_rows, blocks * 64), 99, np.int8) for _ in range(3)]
        self.scales = [np.full((num_rows, blocks * groups), np.nan, np.float32) for groups in (1, 1, 2)]
        pairs = zip(self.quants, self.scales, strict=True)
        self.structs = [STRUCTS["om_card_input"](quants=address(q), scales=address(s)) for q, s in pairs]

    def are_those_of(self, out: Floats) -> bool:
        """out: ``[T, columns]``."""
        is_same = True
        for t, row in enumerate(out):
            for codec, group in enumerate((64, 64, 32)):
                quants, scales = reference.quantize(row, group)
                if codec == 0:  # nf4: the low nibble is the odd column
                    quants = quants.reshape(-1, 2)[:, ::-1].reshape(-1)
                is_same &= bool((self.quants[codec][t] == quants).all()) and are_same(self.scales[codec][t], scales)
        return is_same


def rotary_tables(random: np.random.Generator, rotated_dims: int) -> tuple[Floats, Floats]:
    """Tables of cos and signed sin: not those of a model, and a half of cos unlike the other."""
    return tuple(random_floats(random, NUM_POSITIONS, rotated_dims) for _ in range(2))  # type: ignore[return-value]


def array(kind: str, items: list[Any]) -> Any:
    return (STRUCTS[kind] * len(items))(*items)


class Case:
    """One call of all kernels of an attention."""

    columns: int  # of the result
    query_shape: tuple[int, int]  # as sections read it
    scratch: tuple[int, int]  # heads and dims of what is merged

    def __init__(self, shape: Grouped | Latent, setting: Setting, seed: int) -> None:
        self.shape, self.setting, self.name = shape, setting, name_of(shape)
        self.random = np.random.default_rng(seed)
        self.num_rows = setting.num_rows
        self.angles = rotary_tables(self.random, shape.rotated_dims)

    def _floats(self, *shape: int, scale: float = 1.0) -> Floats:
        return random_floats(self.random, *shape, scale=scale, num_special=self._num_special())

    def _num_special(self) -> int:
        return self.setting.num_special if self.random.random() < 0.25 else 0

    def _cache(self, num_heads: int, dims: tuple[int, int]) -> Cache:
        sequences, options = list(self.setting.sequences), self.setting
        return Cache(
            self.random,
            sequences,
            num_heads,
            dims,
            window=options.window,
            chunk=options.chunk,
            is_one_room=options.is_one_room,
            num_special=options.num_special,
        )

    def run(
        self, library: shim.ShimLibrary, *, num_blocks: int = 3, seed: int = 0, is_stopped: bool = False
    ) -> tuple[Floats, Floats, Inputs, Attended]:
        """The queries, the result, its int8 inputs, and what sections gave. num_blocks: of their kernel."""
        given = Pass(self.num_rows, is_stopped=is_stopped)
        query = np.full((self.num_rows, *self.query_shape), np.nan, np.float32)
        attended = Attended(self.num_rows, self.scratch[0], self.cache.most_sections, self.scratch[1])
        out, inputs = np.full((self.num_rows, self.columns), np.nan, np.float32), Inputs(self.num_rows, self.columns)
        self._prepare(library, given, query, seed)
        params = STRUCTS["om_card_attend_params"](
            **{"pass": given.struct, "view": self.cache.view, "query": address(query), "scaling": self.setting.scaling},
            attended=ctypes.addressof(attended.struct),
        )
        library.launch(f"{self.name}_attend", (num_blocks,), (256,), params, seed=seed)
        self._finish(library, given, attended, out, inputs, seed)
        return query, out, inputs, attended

    def check(self, library: shim.ShimLibrary, *, num_blocks: int = 3, seed: int = 0) -> Floats:
        """The same bits as the portable C, in queries, caches, results and int8. Returns the results."""
        with np.errstate(all="ignore"):
            return self._compare(library, num_blocks, seed)

    def _compare(self, library: shim.ShimLibrary, num_blocks: int, seed: int) -> Floats:
        query, out, inputs, _ = self.run(library, num_blocks=num_blocks, seed=seed)
        expected_query, expected_keys, expected_values = self.expected_heads()
        assert are_same(query, expected_query), "queries"
        for planes, *expected in zip(self.cache.planes, expected_keys, expected_values, strict=True):
            for plane, wanted in zip(planes, expected, strict=True):
                assert are_same(from_bf16(plane.read()), from_bf16(wanted)), "the cache"
        expected_out = np.stack([self.expected_row(t, expected_query[t]) for t in range(self.num_rows)])
        assert are_same(out, expected_out), "results"
        assert inputs.are_those_of(out), "int8"
        return out

    def _angles(self, row: int) -> tuple[Floats, Floats]:
        cos, signed_sin = (table[self.cache.positions[row]] for table in self.angles)
        return cos, signed_sin

    def seen(self, row: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Keys and values that a row sees, by the cache as it is now: ``[M, S, D]``."""
        planes, base, token = self.cache.rows[row]
        first = self.cache.first_seen(token, base)
        keys, values = (plane.in_order[:, first : token + 1] for plane in planes)
        return keys, values

    def _launch(
        self, library: shim.ShimLibrary, kernel: str, grid: tuple[int, ...], threads: int, params: Any, seed: int
    ) -> None:
        library.launch(f"{self.name}_{kernel}", grid, (threads,), params, seed=seed)


class GroupedCase(Case):
    def __init__(self, shape: Grouped, setting: Setting, seed: int = 0) -> None:
        super().__init__(shape, setting, seed)
        self.sizes = shape
        n, m, d = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.columns, self.query_shape, self.scratch = n * d, (n, d), (n, d)
        self.cache = self._cache(m, (d, d))
        gated, has_biases = 2 * n if shape.is_gated else n, setting.has_biases and not shape.is_gated
        self.heads = [self._floats(self.num_rows, count, d) for count in (gated, m, m)]
        self.biases = [self._floats(count * d) if has_biases else None for count in (n, m, m)]
        lengths = {"none": None, "head": (d, d), "rotated": (d, d), "all heads": (n * d, m * d)}[shape.norm_span]
        self.norms = [None, None] if lengths is None else [self._floats(length) + 1 for length in lengths]
        self.sinks = self._floats(n) if setting.has_sinks else None

    def _prepare(self, library: shim.ShimLibrary, given: Pass, query: Floats, seed: int) -> None:
        params = STRUCTS["om_card_heads_params"](
            **{"pass": given.struct, "view": self.cache.view, "query": address(query)},
            angles=STRUCTS["om_card_angles"](*map(address, self.angles)),
            heads=(ctypes.c_void_p * 3)(*map(address, self.heads)),
            biases=(ctypes.c_void_p * 3)(*map(address, self.biases)),
            norms=(ctypes.c_void_p * 2)(*map(address, self.norms)),
            epsilons=(ctypes.c_float * 2)(EPSILON, 2 * EPSILON),
            scale_step=self.setting.query_scale[0],
            scale_strength=self.setting.query_scale[1],
            is_gated=int(self.sizes.is_gated),
        )
        num_heads = self.sizes.num_heads + 2 * self.sizes.num_kv_heads
        self._launch(library, "heads", (num_heads, self.num_rows + 1), 128, params, seed)

    def _finish(
        self, library: shim.ShimLibrary, given: Pass, attended: Attended, out: Floats, inputs: Inputs, seed: int
    ) -> None:
        params = STRUCTS["om_card_merge_params"](
            **{"pass": given.struct, "view": self.cache.view, "sinks": address(self.sinks), "out": address(out)},
            attended=ctypes.addressof(attended.struct),
            gates=address(self.heads[0]) if self.sizes.is_gated else None,
            inputs=array("om_card_input", inputs.structs),
        )
        self._launch(library, "merge", (-(-self.columns // 64), self.num_rows + 1), 32, params, seed)

    def expected_heads(self) -> tuple[Floats, list[Any], list[Any]]:
        """Queries; keys and values of each sequence with those of its new rows."""
        queries = []
        for row, (planes, _, token) in enumerate(self.cache.rows):
            angles = (
                tuple(table[self.cache.positions[row]] for table in self.angles) if self.sizes.rotated_dims else None
            )
            finished = [
                reference.finish_heads(
                    self._heads(which, row),
                    self.biases[which],
                    self.norms[which] if which < 2 else None,
                    (EPSILON, 2 * EPSILON, 0.0)[which],
                    angles if which < 2 else None,
                    self.sizes.rotation,
                    is_normed_rotated=self.sizes.norm_span == "rotated",
                )
                for which in range(3)
            ]
            position = int(self.cache.positions[row])
            queries.append(reference.scale_queries(finished[0], position, *self.setting.query_scale))
            for plane, rows in zip(planes, finished[1:], strict=True):
                plane.in_order[:, token] = reference.round_to_bf16(rows)
        keys, values = ([pair[n].in_order for pair in self.cache.planes] for n in range(2))
        return np.stack(queries), keys, values

    def _heads(self, which: int, row: int) -> Floats:
        heads = self.heads[which][row]
        return np.ascontiguousarray(heads[::2]) if self.sizes.is_gated and which == 0 else heads

    def expected_row(self, row: int, query: Floats) -> Floats:
        keys, values = self.seen(row)
        out = reference.attend(query, keys, None, values, self.setting.scaling, self.sinks)
        if self.sizes.is_gated:
            out = reference.multiply_by_gates(out, self.heads[0][row, 1::2])
        return out.reshape(-1)


class LatentCase(Case):
    def __init__(self, shape: Latent, setting: Setting, seed: int = 0) -> None:
        super().__init__(shape, setting, seed)
        self.sizes = shape
        n, k, p, v, z = shape.num_heads, shape.unrotated_dims, shape.rotated_dims, shape.value_dims, shape.rank
        self.columns, self.query_shape, self.scratch = n * v, (n, z + p), (n, z)
        self.cache = self._cache(1, (z, p))
        self.heads, self.compressed = self._floats(self.num_rows, n, k + p), self._floats(self.num_rows, z + p)
        self.biases = [self._floats(n * (k + p)), self._floats(z + p)] if setting.has_biases else [None, None]
        self.norm = self._floats(z) + 1
        expansion = self._floats(n * (k + v), z, scale=0.2)
        self.expansion: NDArray[Any] = to_bf16(expansion) if shape.codec == "bf16" else expansion

    def _prepare(self, library: shim.ShimLibrary, given: Pass, query: Floats, seed: int) -> None:
        params = STRUCTS["om_card_absorb_params"](
            **{"pass": given.struct, "view": self.cache.view, "query": address(query)},
            angles=STRUCTS["om_card_angles"](*map(address, self.angles)),
            heads=address(self.heads),
            compressed=address(self.compressed),
            biases=(ctypes.c_void_p * 2)(*map(address, self.biases)),
            norm=address(self.norm),
            expansion=address(self.expansion),
            epsilon=EPSILON,
        )
        num_blocks = self.sizes.num_heads * -(-self.sizes.rank // 64) + self.sizes.max_rows
        self._launch(library, "absorb", (num_blocks,), 128, params, seed)

    def _finish(
        self, library: shim.ShimLibrary, given: Pass, attended: Attended, out: Floats, inputs: Inputs, seed: int
    ) -> None:
        params = STRUCTS["om_card_expand_params"](
            **{"pass": given.struct, "view": self.cache.view, "out": address(out)},
            attended=ctypes.addressof(attended.struct),
            expansion=address(self.expansion),
            inputs=array("om_card_input", inputs.structs),
        )
        self._launch(library, "expand", (-(-self.columns // 64),), 256, params, seed)

    def expected_heads(self) -> tuple[Floats, list[Any], list[Any]]:
        k, z = self.sizes.unrotated_dims, self.sizes.rank
        per_head = self.expansion.reshape(self.sizes.num_heads, -1, z)
        inner = np.ascontiguousarray(per_head[:, :k].transpose(0, 2, 1)).reshape(-1, k)
        queries = []
        for row, (planes, _, token) in enumerate(self.cache.rows):
            angles = self._angles(row)
            heads, compressed = self.heads[row].copy(), self.compressed[row].copy()
            if self.biases[0] is not None:
                heads += self.biases[0].reshape(heads.shape)
                compressed += self.biases[1]
            latent = reference.finish_heads(compressed[None, :z], None, self.norm, EPSILON, None, "halves")
            turned = self._turn(np.concatenate((heads[:, k:], compressed[None, z:])), angles)
            planes[0].in_order[:, token] = reference.round_to_bf16(latent)
            planes[1].in_order[:, token] = reference.round_to_bf16(turned[-1:])
            moved = [reference.multiply(inner, n * z, z, heads[n, :k]) for n in range(self.sizes.num_heads)]
            queries.append(np.concatenate((np.stack(moved), turned[:-1]), axis=1))
        latents, keys = ([pair[n].in_order for pair in self.cache.planes] for n in range(2))
        return np.stack(queries), latents, keys

    def _turn(self, heads: Floats, angles: Any) -> Floats:
        return reference.finish_heads(np.ascontiguousarray(heads), None, None, 0.0, angles, self.sizes.rotation)

    def expected_row(self, row: int, query: Floats) -> Floats:
        latents, keys = self.seen(row)
        means = reference.attend(query, latents, keys, latents, self.setting.scaling, None)
        k, v = self.sizes.unrotated_dims, self.sizes.value_dims
        firsts = [n * (k + v) + k for n in range(self.sizes.num_heads)]
        return np.concatenate([reference.multiply(self.expansion, f, v, m) for f, m in zip(firsts, means, strict=True)])


def case_of(shape: Grouped | Latent, setting: Setting, seed: int = 0) -> Case:
    return GroupedCase(shape, setting, seed) if isinstance(shape, Grouped) else LatentCase(shape, setting, seed)
