"""Rooms of a cache, as native calls read them: what each row of a step attends to, and where its own key goes."""

from array import array
from collections.abc import Iterable

from torch import Tensor

# Of keys and of values, from the first token that the new one sees on, [1, N, C or less, D]; and how many it sees.
Room = tuple[Tensor, Tensor, int]
Rooms = Iterable[Room] | array  # type: ignore[type-arg]


def rooms_array(rooms: Rooms) -> "array[int]":
    """`om_room` of each: addresses of keys and values, `tokens_apart` and the number of tokens.

    Rows of one sequence follow each other, in rooms of the same memory. An array has the fields already.
    """
    if isinstance(rooms, array):
        return rooms
    fields: array[int] = array("q")
    for keys, values, length in rooms:
        fields.extend((keys.data_ptr(), values.data_ptr(), tokens_apart(keys), length))
    return fields


def tokens_apart(keys: Tensor) -> int:
    """The distance of two heads of ``[1, M, C, D]`` in tokens: at least C."""
    return keys.stride(1) // keys.shape[3]
