"""Where the card finds keys and values: rooms of the cache that prompts write, in pages.

T rows, D dims.
"""

import ctypes
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from offload_moe.card.angles import Angles
from offload_moe.card.attention import Seen, value_width
from offload_moe.card.memory import Allocate, write
from offload_moe.card.model import DecoderParts
from offload_moe.card.states import States
from offload_moe.card.structs import constant, struct
from offload_moe.decode.cache import ROOMY, RoomyLayer, window_of
from offload_moe.families.layer_spec import AttentionSpec
from offload_moe.native.constants import MAX_ROWS

PAGE, SECTION = constant("OM_CARD_PAGE"), constant("OM_CARD_SECTION")
BF16_BYTES = 2


class Attended:
    """What heads sum for each section, shared by all layers; more of them lie elsewhere, at the same struct."""

    def __init__(self, parts: DecoderParts, allocate: Allocate) -> None:
        specs = [layer.spec.attention for layer in parts.layers if layer.spec.attention.delta is None]
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
            write(self._struct, struct("attended")(sections=sections, sums=sums, capacity=capacity))
            self.capacity = capacity


class _Held:
    """Where the tokens of a sequence lie in each layer that keeps them, behind an `extend`.

    places: rooms of keys and of values, and the index of the last token. bases: positions of index 0.
    """

    def __init__(self, cache: Any, windows: Mapping[int, int | None], end: int) -> None:
        """windows: of these layers. end: the position of the next token."""
        layers = [cache.layers[index] for index in windows]
        self.cache = cache  # kept alive: its id is not another's
        self.places = [layer.place for layer in layers]
        self.bases = [end - 1 - last for _, _, last in self.places]
        self._layers = [(index, layer, layer.end[0]) for index, layer in zip(windows, layers, strict=True)]
        self._needs_inference_mode = self.places[0][0].is_inference()
        first_end = layers[0].end[1]
        lefts = [
            min(keys.shape[2], window if window is not None and type(layer) is RoomyLayer else keys.shape[2]) - 1 - last
            for layer, window, (keys, _, last) in zip(layers, windows.values(), self.places, strict=True)
        ]
        self._limit = first_end + min(lefts)

    def has_room(self, num_tokens: int) -> bool:
        """Whether the rooms are the same, and take so many more tokens."""
        if self._needs_inference_mode and not torch.is_inference_mode_enabled():
            return False
        now = self.cache.layers
        if any(now[index] is not known or known.end[0] is not room for index, known, room in self._layers):
            return False
        return bool(self._layers[0][1].end[1] + num_tokens <= self._limit)

    def is_at(self, position: int) -> bool:
        """Whether the next token of each layer is at the place of this position."""
        pairs = zip(self._layers, self.bases, strict=True)
        return all(layer.end[1] + base == position for (_, layer, _), base in pairs)


class Rooms:
    """The rooms of all layers for the rows of the next pass."""

    def __init__(self, parts: DecoderParts, allocate: Allocate, num_positions: int, device: torch.device) -> None:
        self._parts, self._allocate, self._device = parts, allocate, device
        self.angles = Angles(parts, num_positions, device)
        self.attended, self.states = Attended(parts, allocate), States(parts, allocate)
        self._specs = [layer.spec.attention for layer in parts.layers]
        self._windows = {at: spec.sliding_window for at, spec in enumerate(self._specs) if spec.delta is None}
        self._size = ctypes.sizeof(struct("room"))
        self._described = (struct("room") * (len(parts.layers) * MAX_ROWS))()  # rows of a layer beside each other
        self._structs = allocate(ctypes.sizeof(self._described))
        self._pages: dict[tuple[int, int], Tensor] = {}  # by address and capacity of a room: its pages' addresses
        self._known: dict[int, tuple[int, ...]] = {}  # by place in `_described`: what it was made from
        self._held: dict[int, _Held] = {}  # by cache of the last rows that were prepared
        self._rows: list[int] = []  # caches of these rows

    def seen(self, layer: int, processors: int) -> Seen:
        """What a layer's kernels read."""
        return Seen(
            rooms=self._structs.data_ptr() + layer * MAX_ROWS * self._size,
            states=self.states.address(layer),
            cos=self.angles.cos.data_ptr(),
            signed_sin=self.angles.signed_sin.data_ptr(),
            attended=self.attended.address,
            processors=processors,
        )

    def fits(self, cache: Any, num_tokens: int) -> bool:
        """Whether the next tokens of a sequence can be written in place, at positions that the tables have."""
        if cache is None or len(cache.layers) < len(self._parts.layers):
            return False
        if not self.angles.takes(cache.get_seq_length() + num_tokens):
            return False
        if not self.states.takes(cache, self._specs):
            return False
        held = self._held.get(id(cache))
        if held is not None and held.has_room(num_tokens):
            return True
        return all(_takes(cache.layers[index], self._specs[index], num_tokens) for index in self._windows)

    def has_place(self, caches: Sequence[Any], positions: Sequence[int]) -> bool:
        """Whether the rows are in the rooms that the card has, at their places: nothing has to be prepared.

        Behind `States.moves` of these rows, as `prepare` is.
        """
        if [id(cache) for cache in caches] != self._rows[: len(caches)]:
            return False
        firsts = dict(zip(reversed(self._rows[: len(caches)]), reversed(positions), strict=True))
        return all(
            held.has_room(len(positions)) and held.is_at(firsts[cache]) and self.states.are_described(cache)
            for cache, held in self._held.items()
            if cache in firsts
        )

    def extend(self, caches: Sequence[Any]) -> None:
        """Let the caches count the rows."""
        for _, group in groupby(caches, key=id):
            rows = list(group)
            for layer in rows[0].layers[: len(self._parts.layers)]:
                layer.places(len(rows))

    def prepare(self, caches: Sequence[Any], positions: Sequence[int]) -> None:
        """Extend the caches, and write where their rooms are, for this row and later ones; no pass may be under way."""
        self.forget()
        self.extend(caches)
        ends = {id(cache): position + 1 for cache, position in zip(caches, positions, strict=True)}
        for cache in {id(cache): cache for cache in caches}.values():
            self._held[id(cache)] = _Held(cache, self._windows, ends[id(cache)])
        self._rows = [id(cache) for cache in caches]
        self._rows += [self._rows[-1]] * (MAX_ROWS - len(caches))  # more rows of the last sequence may come
        for row, cache in enumerate(self._rows):
            held = self._held[cache]
            for index, (keys, values, _), base in zip(self._windows, held.places, held.bases, strict=True):
                self._describe(index * MAX_ROWS + row, keys, values, base)
        write(self._structs, self._described)
        self.states.describe(self._rows)
        self._prune()

    def forget(self) -> None:
        """Something else may have changed the caches."""
        self._held, self._rows = {}, []
        self.states.forget()

    def _describe(self, at: int, keys: Tensor, values: Tensor, base: int) -> None:
        source = keys.data_ptr(), values.data_ptr(), keys.shape[2], base
        if self._known.get(at) == source:
            return
        self._known[at] = source
        self._described[at] = struct("room")(
            key_pages=self._pages_of(keys),
            value_pages=self._pages_of(values),
            key_stride=keys.shape[2] * keys.shape[3],
            value_stride=values.shape[2] * values.shape[3],
            base=base,
        )

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


def _takes(layer: Any, spec: AttentionSpec, num_tokens: int) -> bool:
    window = window_of(layer, spec.sliding_window, spec.chunk)
    return type(layer) in ROOMY and layer.takes(num_tokens, torch.bfloat16, window)
