"""Caches in pages, as kernels of attention find them.

M key/value heads, D dims. Pages lie anywhere in a pool; what a row does not see is not there at all: its pages have no
address, and the tokens behind the last row are NaN.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.support.cuda.bits import address, random_floats, to_bf16
from tests.support.cuda.card import SOURCES, copied
from tests.support.cuda.params import structs_of

PAGE = 128
POISON = 0x7FC1  # a NaN
STRUCTS = structs_of(SOURCES / "params.h", SOURCES / "params_attention.h")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Rows of one sequence. length: tokens of its room before them. base: the position of the room's first token."""

    length: int
    num_rows: int = 1
    base: int = 0


class Plane:
    """Keys, or values, of one sequence: in order, and in pages."""

    def __init__(
        self,
        random: np.random.Generator,
        num_heads: int,
        dims: int,
        num_tokens: int,
        *,
        is_one_room: bool,
        num_special: int,
    ) -> None:
        """is_one_room: pages are parts of one room [M, C, D], else pages [M, PAGE, D] in any order."""
        self.num_heads, self.dims, self.num_tokens = num_heads, dims, num_tokens
        num_pages = -(-num_tokens // PAGE)
        self.in_order = to_bf16(random_floats(random, num_heads, num_tokens, dims, num_special=num_special))
        self.pool = np.full((num_pages + 2) * num_heads * PAGE * dims, POISON, np.uint16)
        if is_one_room:
            self.stride, starts = (num_pages + 2) * PAGE * dims, np.arange(num_pages) * PAGE * dims
        else:
            self.stride = PAGE * dims
            starts = random.permutation(num_pages + 2)[:num_pages] * num_heads * PAGE * dims
        self.starts = starts
        self.table = copied(np.array([self.pool.ctypes.data + 2 * int(start) for start in starts], np.uint64))

    def fill(self, num_tokens: int) -> None:
        """Put the first tokens into the pages."""
        for head in range(self.num_heads):
            for token in range(num_tokens):
                self.place(head, token)[:] = self.in_order[head, token]

    def place(self, head: int, token: int) -> NDArray[np.uint16]:
        start = int(self.starts[token // PAGE]) + head * self.stride + token % PAGE * self.dims
        return self.pool[start : start + self.dims]

    def read(self) -> NDArray[np.uint16]:
        """``[M, tokens, D]``"""
        rows = [[self.place(head, token) for token in range(self.num_tokens)] for head in range(self.num_heads)]
        return np.array(rows)

    def hide_before(self, token: int) -> None:
        """Nothing may look at earlier pages."""
        self.table[: token // PAGE] = 0


class Cache:
    """Of some sequences, and the view that rows have of it."""

    def __init__(
        self,
        random: np.random.Generator,
        sequences: list[Sequence],
        num_heads: int,
        dims: tuple[int, int],
        *,
        window: int = 0,
        chunk: int = 0,
        is_one_room: bool = False,
        num_special: int = 0,
    ) -> None:
        """dims: of keys and of values."""
        self.window, self.chunk = window, chunk
        self.planes, self.rows = [], []
        for sequence in sequences:
            tokens = sequence.length + sequence.num_rows
            pair = [
                Plane(random, num_heads, each, tokens, is_one_room=is_one_room, num_special=num_special)
                for each in dims
            ]
            for plane in pair:
                plane.fill(sequence.length)
                plane.hide_before(self.first_seen(sequence.length, sequence.base))
            self.planes.append(pair)
            self.rows += [(pair, sequence.base, sequence.length + n) for n in range(sequence.num_rows)]
        self.positions = np.array([base + token for _, base, token in self.rows], np.int32)
        self._rooms = (STRUCTS["om_card_room"] * len(self.rows))()
        for room, ((keys, values), base, _) in zip(self._rooms, self.rows, strict=True):
            room.key_pages, room.value_pages = address(keys.table), address(values.table)
            room.key_stride, room.value_stride, room.base = keys.stride, values.stride, base

    def first_seen(self, token: int, base: int) -> int:
        if self.chunk:
            return max(0, token - (base + token) % self.chunk)
        return max(0, token + 1 - self.window) if self.window else 0

    @property
    def view(self) -> ctypes.Structure:
        return STRUCTS["om_card_view"](
            rooms=ctypes.addressof(self._rooms),
            positions=address(self.positions),
            window=self.window,
            chunk=self.chunk,
        )

    @property
    def most_sections(self) -> int:
        return max(-(-(token + 1) // 512) for _, _, token in self.rows)
