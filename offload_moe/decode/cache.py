"""A key/value cache with room to grow: a decode step writes one row instead of copying all earlier ones.

Keys and values are rounded to the dtype that they are kept in once, as they enter, and attention always reads them
rounded: a chunk's own ones, too, so that results do not depend on how a prompt is cut into chunks.

Shapes: B batch, N key/value heads, S cached tokens, C capacity, W sliding window, D head dim.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from offload_moe.decode.states import StatesLayer
from offload_moe.native.kernels import Room, tokens_apart

GROWTH = 1.25
STEP = 128  # tokens; capacities are multiples of it


class InRoom:
    """A layer whose keys and values are parts of larger tensors, its room. They are cut out when they are read.

    Other code sets them, to another tensor or to a shorter view; the next update looks where in the room that lies.
    """

    kept: torch.dtype | None
    _room: tuple[Tensor, Tensor] | None = None
    _place: tuple[int, int] | None = None  # the first and the last token of both in the room; None: see `_parts`
    _parts: tuple[Tensor | None, Tensor | None] | None = (None, None)  # None: not cut out yet
    _addresses: tuple[int, ...] = ()  # of the room: keys, values, tokens between heads, bytes of a key and of a value

    def __getstate__(self) -> dict[str, Any]:
        """A copy gets room of its own once it grows: addresses are those of this one's."""
        return vars(self) | {"_parts": self._cut_out(), "_place": None, "_room": None, "_addresses": ()}

    @property
    def keys(self) -> Any:
        return self._cut_out()[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._parts, self._place = (keys, self._cut_out()[1]), None

    @property
    def values(self) -> Any:
        return self._cut_out()[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._parts, self._place = (self._cut_out()[0], values), None

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of the room that `extend` returns."""
        dtype: torch.dtype = (
            self.kept or (self.keys if self._place is None or self._room is None else self._room[0]).dtype
        )
        return dtype

    @property
    def is_one_sequence(self) -> bool:
        """Whether it holds tokens of one sequence, behind which more can be written in place."""
        keys = self.keys if self._place is None or self._room is None else self._room[0]
        return keys is not None and keys.dim() == 4 and len(keys) == 1 and not keys.requires_grad

    def extend(self, num_tokens: int = 1) -> list[Room]:
        """Count more tokens of one sequence, whose keys and values the caller writes. Where `can_extend`.

        Returns of each the room ``[1, N, C, D]`` of keys and of values from the first token on that it sees, and how
        many it sees.
        """
        seen = self._advance(num_tokens)
        assert self._room is not None
        keys, values = self._room
        return [(keys[:, :, first:], values[:, :, first:], last - first) for first, last in seen]

    def places(self, num_tokens: int = 1, chunk: int | None = None) -> list[int]:
        """`extend` for native calls: the fields of `rooms_array`.

        chunk: positions are cut into chunks of so many, and a token sees its own alone.
        """
        seen = self._advance(num_tokens)
        if chunk is not None:
            begin: int = self.get_seq_length() - num_tokens  # type: ignore[attr-defined]
            seen = [(max(first, last - (begin + at) % chunk), last) for at, (first, last) in enumerate(seen)]
        keys, values, apart, key_bytes, value_bytes = self._addresses
        fields: list[int] = []
        for first, last in seen:
            fields += (keys + first * key_bytes, values + first * value_bytes, apart, last - first)
        return fields

    def _advance(self, num_tokens: int) -> list[tuple[int, int]]:
        """Count more tokens. Returns of each the first one in the room that it sees, and its own place."""
        raise NotImplementedError

    @property
    def place(self) -> tuple[Tensor, Tensor, int]:
        """The room of keys and of values behind an `extend`, and the index in them of the last token."""
        place, room = self._find(), self._room
        assert room is not None
        assert place is not None
        return (*room, place[1] - 1)

    @property
    def end(self) -> tuple[tuple[Tensor, Tensor] | None, int]:
        """The room, and the index in it of the next token; None while other code's tensors were not looked up in it."""
        return (None, 0) if self._place is None else (self._room, self._place[1])

    def give_room_up(self) -> None:
        """Use no place beside the present keys and values any more."""
        self._parts, self._place, self._room = self._cut_out(), None, None

    def _take_over(self, layer: DynamicLayer) -> None:
        for name, value in vars(layer).items():
            setattr(self, name, value)
        if layer.is_initialized and self.kept is not None:
            self.keys, self.values = self.keys.to(self.kept), self.values.to(self.kept)

    def _cut_out(self) -> tuple[Tensor | None, Tensor | None]:
        if self._parts is None:
            assert self._room is not None
            assert self._place is not None
            keys, values = (part[:, :, slice(*self._place)] for part in self._room)
            self._parts = keys, values
        return self._parts

    def _put(self, room: tuple[Tensor, Tensor], first: int, end: int) -> None:
        if room is not self._room:
            row_bytes = [part.element_size() * part.stride(2) for part in room]
            self._addresses = (room[0].data_ptr(), room[1].data_ptr(), tokens_apart(room[0]), *row_bytes)
        self._room, self._place, self._parts = room, (first, end), None

    def _find(self) -> tuple[int, int] | None:
        """The first and the last token in the room; None where they are elsewhere, or it may not be written to."""
        room = self._room
        if room is None or (room[0].is_inference() and not torch.is_inference_mode_enabled()):
            return None
        return _place_of(self.keys, room[0]) if self._place is None else self._place


class RoomyLayer(InRoom, DynamicLayer):
    """transformers' growing layer, at the beginning of its room. Everything else (reorder, select) is inherited."""

    def __init__(self, context: int | None = None, kept: torch.dtype | None = None) -> None:
        """context: tokens that memory was planned for: no more room is made ahead than that.

        kept: the dtype of keys and values in memory; None: the one they come in.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.context, self.kept = context, kept

    @classmethod
    def of(cls, layer: DynamicLayer, context: int | None = None, kept: torch.dtype | None = None) -> "RoomyLayer":
        """The same contents; the old layer must not be used any more."""
        roomy = cls(context, kept)
        roomy._take_over(layer)
        return roomy

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, N, T, D]``; returns all keys and values as kept, ``[B, N, S + T, D]``, in the dtype given."""
        if key_states.requires_grad:  # a gradient must not see its input overwritten
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        room = self._room_for(total) or self._make_room(key_states, value_states, length, total)
        for place, new in zip(room, (key_states, value_states), strict=True):
            place[:, :, length:total] = new
        self._put(room, 0, total)
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self._place is None else self._place[1]

    @property
    def can_extend(self) -> bool:
        """Whether `extend` has a sequence to append to."""
        return self.is_one_sequence

    def takes(self, num_tokens: int, dtype: torch.dtype, window: int | None) -> bool:
        """Whether native calls may `extend` it, with this dtype, and each token sees so many of those before it."""
        is_seen = window is None or self.get_seq_length() + num_tokens <= window
        return is_seen and self.is_one_sequence and self.kept_dtype == dtype

    def _advance(self, num_tokens: int) -> list[tuple[int, int]]:
        length = self.get_seq_length()
        total = length + num_tokens
        room = self._room_for(total)
        if room is None:
            room = self._make_room(self.keys[:, :, :0], self.values[:, :, :0], length, total)
        self._put(room, 0, total)
        return [(0, index) for index in range(length, total)]

    def roll_back(self, num_tokens: int) -> None:
        """Take back the last tokens that `extend` counted. Unlike `crop` it keeps the room: others come next."""
        place, room = self._find(), self._room
        assert room is not None
        assert place is not None
        self._put(room, 0, place[1] - num_tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; the room is given back once no more than half of it is used."""
        super().crop(tokens_to_remove)
        if self._room is not None and 2 * self.get_seq_length() <= self._room[0].shape[2]:
            self.keys, self.values, self._room = self.keys.clone(), self.values.clone(), None

    def reset(self) -> None:
        super().reset()
        self._room = None

    def _room_for(self, total: int) -> tuple[Tensor, Tensor] | None:
        """The present room, if it may be written to and holds so many tokens."""
        place, room = self._find(), self._room
        return room if room is not None and place is not None and place[0] == 0 and total <= room[0].shape[2] else None

    def _make_room(self, key_states: Tensor, value_states: Tensor, length: int, total: int) -> tuple[Tensor, Tensor]:
        capacity = _in_steps(int(total * GROWTH))
        if self.context is not None:
            capacity = min(capacity, max(_in_steps(total), _in_steps(self.context)))
        places = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            place = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3], dtype=self.kept)
            if length:
                place[:, :, :length] = old
            places.append(place)
        return places[0], places[1]


class RoomySlidingLayer(InRoom, DynamicSlidingWindowLayer):
    """transformers' sliding window, which one token at a time moves through its room. Everything else is inherited.

    Keys and values are the last W - 1 tokens.
    """

    def __init__(self, sliding_window: int, kept: torch.dtype | None = None) -> None:
        """kept: as of `RoomyLayer`."""
        super().__init__(sliding_window)
        self.kept = kept

    @classmethod
    def of(cls, layer: DynamicSlidingWindowLayer, kept: torch.dtype | None = None) -> "RoomySlidingLayer":
        """The same contents; the old layer must not be used any more."""
        roomy = cls(layer.sliding_window, kept)
        roomy._take_over(layer)
        return roomy

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, N, T, D]``; returns what the new tokens see and those, ``[B, N, W - 1 + T, D]`` or less."""
        if key_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        is_step = key_states.shape[2] == 1 and not self.record_past
        if is_step and self.is_initialized and self.keys.dim() == 4 and len(self.keys) == len(key_states):
            ((keys, values, length),) = self.extend()
            keys[:, :, length : length + 1], values[:, :, length : length + 1] = key_states, value_states
            keys, values = keys[:, :, : length + 1], values[:, :, : length + 1]
        else:
            rounded = (part.to(self.kept or part.dtype) for part in (key_states, value_states))
            keys, values = super().update(*rounded, *args, **kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    @property
    def can_extend(self) -> bool:
        """Whether `extend` has a sequence to append to."""
        return self.is_one_sequence and not self.record_past

    def takes(self, num_tokens: int, dtype: torch.dtype, window: int | None) -> bool:
        """As `RoomyLayer.takes`."""
        return window == self.sliding_window and self.can_extend and self.kept_dtype == dtype

    def _advance(self, num_tokens: int) -> list[tuple[int, int]]:
        place, room = self._find(), self._room
        if room is None or place is None or place[1] + num_tokens > room[0].shape[2]:
            length = self.keys.shape[2]
            place, room = (0, length), self._move_to_new_room(length, num_tokens)
        first, end = place
        seen = []
        for last in range(end, end + num_tokens):
            seen.append((first, last))
            first = max(first, last + 1 - (self.sliding_window - 1))
        self._put(room, first, end + num_tokens)
        self.cumulative_length += num_tokens
        return seen

    def roll_back(self, num_tokens: int) -> None:
        """Take back the last tokens that one `extend` counted: the room still has those that left the window by it."""
        place, room = self._find(), self._room
        assert room is not None
        assert place is not None
        end = place[1] - num_tokens
        self.cumulative_length -= num_tokens
        self._put(room, end - min(self.cumulative_length, self.sliding_window - 1), end)

    def trim(self) -> None:
        """Give memory back that many tokens at once needed."""
        length, room = self.keys.shape[2], self._room
        if room is not None and room[0].shape[2] > _in_steps(length + STEP):
            self._put(self._move_to_new_room(length, 0), 0, length)

    def _move_to_new_room(self, length: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        capacity = _in_steps(length + max(STEP, num_tokens))
        places = []
        for old in (self.keys, self.values):
            place = old.new_empty(old.shape[0], old.shape[1], capacity, old.shape[3], dtype=self.kept)
            place[:, :, :length] = old
            places.append(place)
        return places[0], places[1]

    def reset(self) -> None:
        super().reset()
        self._room = None


ROOMY = (RoomyLayer, RoomySlidingLayer)
GOING_BACK = (*ROOMY, StatesLayer)  # layers whose last pass can be taken back


def returning_layers(cache: Cache) -> list[RoomyLayer | RoomySlidingLayer | StatesLayer]:
    """The layers of a cache all of whose layers can go back."""
    layers = []
    for layer in cache.layers:
        assert isinstance(layer, GOING_BACK), type(layer)
        layers.append(layer)
    return layers


def window_of(layer: Any, window: int | None, chunk: int | None) -> int | None:
    """What `takes` is given of a layer of a cache. window, chunk: as of `AttentionSpec`.

    A sliding layer keeps a chunk as it keeps a window.
    """
    return chunk if type(layer) is RoomySlidingLayer and chunk is not None else window


def begin(cache: Any, index: int, keys: Tensor, values: Tensor) -> None:
    """Give the cache of one sequence a layer of ours, where it has none of this index yet.

    keys, values: of no token, ``[1, N, 0, D]``.
    """
    is_there = index < len(cache.layers)
    maker = cache.layer_class_to_replicate
    is_ours = (
        type(cache.layers[index]) in ROOMY if is_there else isinstance(maker, partial) and maker.func is RoomyLayer
    )
    if is_ours and not (is_there and cache.layers[index].is_initialized):
        cache.update(keys, values, index)


def give_room(cache: Cache, context: int | None = None, kept: torch.dtype | None = None) -> None:
    """Let every plain growing or sliding layer of a cache, and growing ones that it will add, grow in place, and every
    plain layer of states go back.

    context, kept: as of `RoomyLayer`.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = RoomyLayer.of(layer, context, kept)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = RoomySlidingLayer.of(layer, kept)
        elif type(layer) is LinearAttentionLayer:
            cache.layers[index] = StatesLayer.of(layer)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = partial(RoomyLayer, context, kept)  # type: ignore[assignment]  # is called


def _in_steps(num_tokens: int) -> int:
    return -(-num_tokens // STEP) * STEP


def _place_of(view: Tensor, room: Tensor) -> tuple[int, int] | None:
    """The tokens of `room` that `view` is; None where it is no view of it (such as a copy for another batch)."""
    is_like = view.stride() == room.stride() and view.shape[:2] == room.shape[:2] and view.dtype == room.dtype
    first, rest = divmod(view.data_ptr() - room.data_ptr(), room.element_size() * room.stride(2))
    end = first + view.shape[2]
    return (first, end) if is_like and rest == 0 and first >= 0 and end <= room.shape[2] else None
