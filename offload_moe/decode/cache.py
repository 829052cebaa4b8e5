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
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from offload_moe.native.kernels import Room

GROWTH = 1.25
STEP = 128  # tokens; capacities are multiples of it


class RoomyLayer(DynamicLayer):
    """transformers' growing layer whose keys and values are the beginnings of larger tensors.

    Everything else (reorder, select) is inherited: those replace `keys` by another tensor or by a shorter view,
    and the next update sees whether it still lies at the beginning of the room.
    """

    keys: Tensor
    values: Tensor
    _room: tuple[Tensor, Tensor] | None = None

    def __init__(self, context: int | None = None, kept: torch.dtype | None = None) -> None:
        """context: tokens that memory was planned for: no more room is made ahead than that.

        kept: the dtype of keys and values in memory; None: the one they come in.
        """
        super().__init__()
        self.context, self.kept = context, kept

    @classmethod
    def of(cls, layer: DynamicLayer, context: int | None = None, kept: torch.dtype | None = None) -> "RoomyLayer":
        """The same contents; the old layer must not be used any more."""
        roomy = cls(context, kept)
        roomy.__dict__.update(layer.__dict__)
        _round_contents(roomy, kept)
        return roomy

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of the room that `extend` returns."""
        return self.kept or self.keys.dtype

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, N, T, D]``; returns all keys and values as kept, ``[B, N, S + T, D]``, in the dtype given."""
        if key_states.requires_grad:  # a gradient must not see its input overwritten
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.keys.shape[-2] if self.keys.dim() == 4 else 0
        total = length + key_states.shape[-2]
        room = self._room
        if room is None or total > room[0].shape[2] or not _begins(self.keys, room[0]):
            self._room = room = self._make_room(key_states, value_states, length, total)
        for place, new in zip(room, (key_states, value_states), strict=True):
            place[:, :, length:total] = new
        self.keys, self.values = room[0][:, :, :total], room[1][:, :, :total]
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

    @property
    def can_extend(self) -> bool:
        """Whether `extend` has a sequence to append to."""
        return _is_one_sequence(self)

    def extend(self, num_tokens: int = 1) -> list[Room]:
        """Count more tokens of one sequence, whose keys and values the caller writes into the room ``[1, N, C, D]``.

        Returns of each the room of keys and of values, and the index of the token. Where `can_extend`; `update` does
        the rest.
        """
        length, room = self.keys.shape[2], self._room
        total = length + num_tokens
        if room is None or total > room[0].shape[2] or not _begins(self.keys, room[0]):
            self._room = room = self._make_room(self.keys[:, :, :0], self.values[:, :, :0], length, total)
        self.keys, self.values = room[0][:, :, :total], room[1][:, :, :total]
        return [(*room, index) for index in range(length, total)]

    @property
    def place(self) -> tuple[Tensor, Tensor, int]:
        """The room of keys and of values behind an `extend`, and the index in them of the last token."""
        assert self._room is not None
        return (*self._room, self.keys.shape[2] - 1)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; the room is given back once no more than half of it is used."""
        super().crop(tokens_to_remove)
        if self._room is not None and 2 * self.get_seq_length() <= self._room[0].shape[2]:
            self.keys, self.values, self._room = self.keys.clone(), self.values.clone(), None

    def give_room_up(self) -> None:
        """Use no place beside the present keys and values any more."""
        self._room = None

    def reset(self) -> None:
        self._room = None
        super().reset()

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


class RoomySlidingLayer(DynamicSlidingWindowLayer):
    """transformers' sliding window, which one token at a time moves through a larger tensor.

    Everything else is inherited; keys and values are the last W - 1 tokens, wherever in the room they lie.
    """

    keys: Tensor
    values: Tensor
    _room: tuple[Tensor, Tensor] | None = None

    def __init__(self, sliding_window: int, kept: torch.dtype | None = None) -> None:
        """kept: as of `RoomyLayer`."""
        super().__init__(sliding_window)
        self.kept = kept

    @classmethod
    def of(cls, layer: DynamicSlidingWindowLayer, kept: torch.dtype | None = None) -> "RoomySlidingLayer":
        """The same contents; the old layer must not be used any more."""
        roomy = cls(layer.sliding_window, kept)
        roomy.__dict__.update(layer.__dict__)
        _round_contents(roomy, kept)
        return roomy

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of the room that `extend` returns."""
        return self.kept or self.keys.dtype

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
        return _is_one_sequence(self) and not self.record_past

    def extend(self, num_tokens: int = 1) -> list[Room]:
        """As `RoomyLayer.extend`; the room of each token begins with the W - 1 tokens before it."""
        length, room = self.keys.shape[2], self._room
        first = None if room is None else _offset(self.keys, room[0])
        if room is None or first is None or first + length + num_tokens > room[0].shape[2]:
            first, room = 0, self._move_to_new_room(length, num_tokens)
            self._room = room
        rooms: list[Room] = []
        end = first + length
        for last in range(end, end + num_tokens):
            rooms.append((room[0][:, :, first:], room[1][:, :, first:], last - first))
            first = max(first, last + 1 - (self.sliding_window - 1))
        end += num_tokens
        self.keys, self.values = room[0][:, :, first:end], room[1][:, :, first:end]
        self.cumulative_length += num_tokens
        return rooms

    @property
    def place(self) -> tuple[Tensor, Tensor, int]:
        """As of `RoomyLayer`."""
        assert self._room is not None
        first = _offset(self.keys, self._room[0])
        assert first is not None
        return (*self._room, first + self.keys.shape[2] - 1)

    def _move_to_new_room(self, length: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        capacity = _in_steps(length + max(STEP, num_tokens))
        places = []
        for old in (self.keys, self.values):
            place = old.new_empty(old.shape[0], old.shape[1], capacity, old.shape[3], dtype=self.kept)
            place[:, :, :length] = old
            places.append(place)
        return places[0], places[1]

    def give_room_up(self) -> None:
        """Use no place beside the present keys and values any more."""
        self._room = None

    def reset(self) -> None:
        self._room = None
        super().reset()


ROOMY = (RoomyLayer, RoomySlidingLayer)


def give_room(cache: Cache, context: int | None = None, kept: torch.dtype | None = None) -> None:
    """Let every plain growing or sliding layer of a cache, and growing ones that it will add, grow in place.

    context, kept: as of `RoomyLayer`.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = RoomyLayer.of(layer, context, kept)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = RoomySlidingLayer.of(layer, kept)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = partial(RoomyLayer, context, kept)


def kept_dtype(*, is_exact: bool) -> torch.dtype:
    """In which native calls keep keys and values. is_exact: they keep activations in full precision."""
    return torch.float32 if is_exact else torch.bfloat16


def _round_contents(layer: RoomyLayer | RoomySlidingLayer, kept: torch.dtype | None) -> None:
    if layer.is_initialized and kept is not None:
        layer.keys, layer.values = layer.keys.to(kept), layer.values.to(kept)


def _in_steps(num_tokens: int) -> int:
    return -(-num_tokens // STEP) * STEP


def _is_one_sequence(layer: DynamicLayer) -> bool:
    keys = layer.keys
    return layer.is_initialized and keys.dim() == 4 and len(keys) == 1 and not keys.requires_grad


def _begins(view: Tensor, room: Tensor) -> bool:
    """Whether `view` is the beginning of `room` (a cropped view is; a copy for another batch is not)."""
    return _offset(view, room) == 0


def _offset(view: Tensor, room: Tensor) -> int | None:
    """The token of `room` at which `view` begins; None where it is no view of it, or may not be written to."""
    is_writable = not room.is_inference() or torch.is_inference_mode_enabled()
    is_like = view.stride() == room.stride() and view.shape[:2] == room.shape[:2] and view.dtype == room.dtype
    offset, rest = divmod(view.data_ptr() - room.data_ptr(), room.element_size() * room.stride(2))
    return offset if is_writable and is_like and rest == 0 and 0 <= offset <= room.shape[2] - view.shape[2] else None
