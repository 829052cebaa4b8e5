"""A key/value cache with room to grow: a decode step writes one row instead of copying all earlier ones.

Shapes: B batch, N key/value heads, S cached tokens, C capacity, D head dim.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

Room = tuple[Tensor, Tensor, int]  # of keys and of values, [1, N, C, D], and the tokens there were

GROWTH = 1.25
STEP = 128  # tokens; capacities are multiples of it


class RoomyLayer(DynamicLayer):
    """transformers' growing layer whose keys and values are the beginnings of larger tensors.

    Everything else (reorder, select) is inherited: those replace `keys` by another tensor or by a shorter view,
    and the next update sees whether it still lies at the beginning of the room.
    """

    keys: Tensor
    values: Tensor
    context: int | None = None  # tokens that memory was planned for: no more room is made ahead than that
    _room: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> "RoomyLayer":
        """The same contents; the old layer must not be used any more."""
        roomy = cls()
        roomy.__dict__.update(layer.__dict__)
        return roomy

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, N, T, D]``; returns all keys and values, ``[B, N, S + T, D]``."""
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
        return self.keys, self.values

    @property
    def can_extend(self) -> bool:
        """Whether `extend` has a sequence to append to."""
        return self.is_initialized and self.keys.dim() == 4 and len(self.keys) == 1 and not self.keys.requires_grad

    def extend(self) -> Room:
        """Count one more token of one sequence, whose key and value the caller writes into the room ``[1, N, C, D]``.

        Returns the room of keys and of values, and the index of the token. Where `can_extend`; `update` does the rest.
        """
        length, room = self.keys.shape[2], self._room
        if room is None or length >= room[0].shape[2] or not _begins(self.keys, room[0]):
            self._room = room = self._make_room(self.keys[:, :, :0], self.values[:, :, :0], length, length + 1)
        self.keys, self.values = room[0][:, :, : length + 1], room[1][:, :, : length + 1]
        return *room, length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; the room is given back once no more than half of it is used."""
        super().crop(tokens_to_remove)
        if self._room is not None and 2 * self.get_seq_length() <= self._room[0].shape[2]:
            self.keys, self.values, self._room = self.keys.clone(), self.values.clone(), None

    def reset(self) -> None:
        self._room = None
        super().reset()

    def _make_room(self, key_states: Tensor, value_states: Tensor, length: int, total: int) -> tuple[Tensor, Tensor]:
        capacity = _in_steps(int(total * GROWTH))
        if self.context is not None:
            capacity = min(capacity, max(_in_steps(total), _in_steps(self.context)))
        places = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            place = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
            if length:
                place[:, :, :length] = old
            places.append(place)
        return places[0], places[1]


def give_room(cache: Cache, context: int | None = None) -> None:
    """Let every plain growing layer of a cache, and those it will add, grow in place.

    context: tokens that memory was planned for.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = roomy = RoomyLayer.of(layer)
            roomy.context = context
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer


def _in_steps(num_tokens: int) -> int:
    return -(-num_tokens // STEP) * STEP


def _begins(view: Tensor, room: Tensor) -> bool:
    """Whether `view` is the beginning of `room` (a cropped view is; a copy for another batch is not)."""
    is_writable = not room.is_inference() or torch.is_inference_mode_enabled()
    return (
        is_writable
        and view.data_ptr() == room.data_ptr()
        and view.stride() == room.stride()
        and view.shape[:2] == room.shape[:2]
        and view.dtype == room.dtype
    )
