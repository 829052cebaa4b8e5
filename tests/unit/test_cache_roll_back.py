"""Taking tokens back out of a cache: the contents and the room of one that never had them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_moe.decode.cache import RoomyLayer, RoomySlidingLayer

HEADS, DIMS, WINDOW = 2, 4, 6
STEPS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=40)


def layer_of(kind: str) -> RoomyLayer | RoomySlidingLayer:
    return RoomyLayer() if kind == "growing" else RoomySlidingLayer(WINDOW)


def part(first: int, num_tokens: int) -> torch.Tensor:
    """Keys of some positions, all different."""
    numbers = torch.arange(first, first + num_tokens, dtype=torch.float32)
    return (numbers[None, None, :, None] + 1) * torch.arange(1, 1 + HEADS * DIMS).view(1, HEADS, 1, DIMS)


def write(layer: RoomyLayer | RoomySlidingLayer, first: int, num_tokens: int) -> None:
    """Tokens by `extend`, as a pass of several rows writes them: all before any is read."""
    for at, (keys, values, index) in enumerate(layer.extend(num_tokens)):
        keys[:, :, index : index + 1] = part(first + at, 1)
        values[:, :, index : index + 1] = -part(first + at, 1)


def check(layer: RoomyLayer | RoomySlidingLayer, length: int) -> None:
    kept = length if isinstance(layer, RoomyLayer) else min(length, WINDOW - 1)
    assert layer.get_seq_length() == length
    assert torch.equal(layer.keys, part(length - kept, kept))
    assert torch.equal(layer.values, -part(length - kept, kept))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["growing", "sliding"]), st.integers(1, 20), STEPS)
def test_any_passes_and_rejections(kind: str, num_prompt: int, steps: list[tuple[int, int]]) -> None:
    layer = layer_of(kind)
    layer.update(part(0, num_prompt), -part(0, num_prompt))
    length = num_prompt
    for num_rows, num_wrong in steps:
        write(layer, length, num_rows)
        check(layer, length + num_rows)
        layer.roll_back(min(num_wrong, num_rows))
        length += num_rows - min(num_wrong, num_rows)
        check(layer, length)


def test_the_room_stays() -> None:
    layer = RoomyLayer()
    layer.update(part(0, 3), -part(0, 3))
    (room, _, _), *_ = layer.extend(8)
    layer.roll_back(8)
    assert layer.extend(1)[0][0].data_ptr() == room.data_ptr()
