"""Where the card finds keys and values: rooms of the cache that prompts write, in pages, and tables of rotary angles.

T rows, D dims.
"""

import ctypes
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from offload_moe.card.attention import Seen, value_width
from offload_moe.card.memory import Allocate
from offload_moe.card.model import DecoderParts
from offload_moe.card.structs import constant, struct
from offload_moe.decode.cache import ROOMY
from offload_moe.native.constants import MAX_ROWS

PAGE, SECTION = constant("OM_CARD_PAGE"), constant("OM_CARD_SECTION")
ANGLES_AT_ONCE = 4096  # positions
BF16_BYTES = 2


class Angles:
    """Tables of the rotary embedding: cos and signed sin ``[positions, D]``."""

    def __init__(self, parts: DecoderParts, num_positions: int, device: torch.device) -> None:
        """Raises: Uncovered where the embedding is of other dims than the layers rotate."""
        rotated = {layer.spec.attention.rotated_dims for layer in parts.layers if layer.spec.attention.rotary != "none"}
        self.num_positions = num_positions
        self.cos = self.signed_sin = torch.zeros(1, 1, device=device)
        if rotated:
            wiring, (dims,) = parts.wiring, rotated
            rotary = wiring.step_rotary(dims)
            tables: list[tuple[Tensor, Tensor]] = []
            with torch.inference_mode():
                for first in range(0, num_positions, ANGLES_AT_ONCE):
                    positions = torch.arange(first, min(first + ANGLES_AT_ONCE, num_positions), device=device)[None]
                    tables.append(rotary.prepare(wiring.embed_positions(positions)))
                self.cos, self.signed_sin = (
                    torch.cat([table[part].reshape(-1, dims).float() for table in tables]).contiguous()
                    for part in (0, 1)
                )


class Attended:
    """What heads sum for each section, shared by all layers; more of them lie elsewhere, at the same struct."""

    def __init__(self, parts: DecoderParts, allocate: Allocate) -> None:
        specs = [layer.spec.attention for layer in parts.layers]
        self._heads, self._width = max(spec.num_heads for spec in specs), max(map(value_width, specs))
        self._allocate = allocate
        self._struct = allocate(ctypes.sizeof(struct("attended")))
        self._buffers: list[Tensor] = []
        self.capacity = 0

    @property
    def address(self) -> int:
        return self._struct.data_ptr()

    def have(self, num_tokens: int) -> None:
        """Room for so many tokens that a row sees; no pass may be under way."""
        capacity = -(-num_tokens // SECTION)
        if capacity > self.capacity:
            rows = MAX_ROWS * self._heads * capacity
            self._buffers = [self._allocate(8 * rows), self._allocate(4 * rows * self._width)]
            sections, sums = (buffer.data_ptr() for buffer in self._buffers)
            _write(self._struct, struct("attended")(sections=sections, sums=sums, capacity=capacity))
            self.capacity = capacity


class Rooms:
    """The rooms of all layers for the rows of the next pass."""

    def __init__(self, parts: DecoderParts, allocate: Allocate, num_positions: int, device: torch.device) -> None:
        self._parts, self._allocate, self._device = parts, allocate, device
        self.angles = Angles(parts, num_positions, device)
        self.attended = Attended(parts, allocate)
        self._size = ctypes.sizeof(struct("room"))
        self._structs = allocate(len(parts.layers) * MAX_ROWS * self._size)
        self._pages: dict[tuple[int, int], Tensor] = {}  # by address and capacity of a room: its pages' addresses
        self._known: dict[int, tuple[int, ...]] = {}  # by place in `_structs`: what it was written from
        self._last: tuple[list[Any], list[Tensor]] = ([], [])  # caches of the last pass, and the views of their layers
        self._num_left = 0  # tokens for which the last caches' rooms suffice

    def seen(self, layer: int, processors: int) -> Seen:
        """What a layer's kernels read."""
        return Seen(
            rooms=self._structs.data_ptr() + layer * MAX_ROWS * self._size,
            cos=self.angles.cos.data_ptr(),
            signed_sin=self.angles.signed_sin.data_ptr(),
            attended=self.attended.address,
            processors=processors,
        )

    def fits(self, cache: Any, num_tokens: int) -> bool:
        """Whether the next tokens of a sequence can be written in place, at positions that the tables have."""
        if cache is None or len(cache.layers) < len(self._parts.layers):
            return False
        if cache.get_seq_length() + num_tokens > self.angles.num_positions:
            return False
        return all(
            type(layer) in ROOMY and layer.takes(num_tokens, torch.bfloat16, each.spec.attention.sliding_window)
            for layer, each in zip(cache.layers, self._parts.layers, strict=False)
        )

    def has_place(self, caches: Sequence[Any]) -> bool:
        """Whether the rows follow those of the last pass, in the same rooms: nothing has to be prepared."""
        last, views = self._last
        if self._num_left < len(caches) or len(last) != len(caches):
            return False
        return all(a is b for a, b in zip(last, caches, strict=True)) and all(
            layer.keys is view for layer, view in zip(_layers(caches, len(self._parts.layers)), views, strict=True)
        )

    def extend(self, caches: Sequence[Any]) -> None:
        """Let the caches count the rows."""
        num_layers = len(self._parts.layers)
        for _, group in groupby(caches, key=id):
            rows = list(group)
            for layer in rows[0].layers[:num_layers]:
                layer.extend(len(rows))
        self._last = list(caches), [layer.keys for layer in _layers(caches, num_layers)]
        self._num_left -= len(caches)

    def prepare(self, caches: Sequence[Any], positions: Sequence[int]) -> None:
        """Extend the caches, and write where their rooms are; no pass may be under way."""
        self.extend(caches)
        places: dict[int, list[tuple[Tensor, Tensor, int]]] = {}
        ends = {id(cache): position for cache, position in zip(caches, positions, strict=True)}
        for index in range(len(self._parts.layers)):
            for row, cache in enumerate(caches):
                found = places.setdefault(id(cache), [layer.place for layer in cache.layers[: len(self._parts.layers)]])
                self._write(index, row, found[index], ends[id(cache)])
        self._num_left = min(keys.shape[2] - 1 - last for found in places.values() for keys, _, last in found)
        self._prune()

    def forget(self) -> None:
        """Something else may have changed the caches."""
        self._last = [], []

    def _write(self, index: int, row: int, place: tuple[Tensor, Tensor, int], position: int) -> None:
        keys, values, last = place
        base, at = position - last, index * MAX_ROWS + row
        source = keys.data_ptr(), values.data_ptr(), keys.shape[2], base
        if self._known.get(at) == source:
            return
        self._known[at] = source
        made = struct("room")(
            key_pages=self._pages_of(keys),
            value_pages=self._pages_of(values),
            key_stride=keys.shape[2] * keys.shape[3],
            value_stride=values.shape[2] * values.shape[3],
            base=base,
        )
        _write(self._structs[at * self._size :], made)

    def _pages_of(self, room: Tensor) -> int:
        """The address of the list of a room's pages: ``[1, N, C, D]``, whose tokens follow each other."""
        key = room.data_ptr(), room.shape[2]
        if key not in self._pages:
            step = PAGE * room.shape[3] * BF16_BYTES
            addresses = [key[0] + page * step for page in range(-(-room.shape[2] // PAGE))]
            pages = self._allocate(8 * len(addresses))
            pages.view(torch.int64)[: len(addresses)] = torch.tensor(addresses, dtype=torch.int64)
            self._pages[key] = pages
        return self._pages[key].data_ptr()

    def _prune(self) -> None:
        used = {(address, known[2]) for known in self._known.values() for address in known[:2]}
        for key in self._pages.keys() - used:
            del self._pages[key]


def _layers(caches: Sequence[Any], num_layers: int) -> list[Any]:
    return [layer for _, group in groupby(caches, key=id) for layer in next(group).layers[:num_layers]]


def _write(memory: Tensor, value: ctypes.Structure) -> None:
    content = torch.frombuffer(bytearray(bytes(value)), dtype=torch.uint8)
    memory[: len(content)] = content
