"""Taking tokens back out of a cache: the contents and the room of one that never had them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import LinearAttentionLayer

from offload_moe.decode.cache import RoomyLayer, RoomySlidingLayer
from offload_moe.decode.states import NUM_PLACES, StatesLayer

HEADS, DIMS, WINDOW = 2, 4, 6
STATES = torch.Size([1, 3, 4]), torch.Size([1, 2, 2, 3])  # inputs of a convolution, and a state
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


def moved(states: list[torch.Tensor], token: int) -> list[torch.Tensor]:
    """States behind one more token: all different, and they depend on the order of the tokens."""
    return [0.5 * state + torch.arange(state.numel()).view(state.shape) * (token + 1) for state in states]


def present(layer: StatesLayer) -> list[torch.Tensor]:
    return [layer.conv_states[0], layer.recurrent_states[0]]


def write_states(layer: StatesLayer, tokens: list[int], *, by_module: bool) -> None:
    if by_module:
        for token, _ in zip(tokens, layer.rows(len(tokens)), strict=True):
            conv_states, recurrent_states = moved(present(layer), token)
            layer.update_conv_state(conv_states[..., -1:])
            layer.conv_states[0].copy_(conv_states)
            layer.update_recurrent_state(recurrent_states)
        return
    places = {state.data_ptr(): state for state in present(layer)}
    fields = layer.places(len(tokens))
    places |= {state.data_ptr(): state for ring in layer.rings for state in ring}
    for token, row in zip(tokens, zip(*[iter(fields)] * 4, strict=True), strict=True):
        inputs, state, before, behind = row
        sizes = [4 * each.numel() for each in present(layer)]
        read = [places[at + before * size] for at, size in zip((inputs, state), sizes, strict=True)]
        left = [places[at + behind * size] for at, size in zip((inputs, state), sizes, strict=True)]
        for target, value in zip(left, moved(read, token), strict=True):
            target.copy_(value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8), st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_states_after_any_passes_and_rejections(steps: list[tuple[int, int, bool, bool]]) -> None:
    """By modules and by native calls, in turn; passes that keep what they go through, and others."""
    generator = torch.Generator().manual_seed(1)
    expected = [torch.rand(shape, generator=generator) for shape in STATES]
    plain = LinearAttentionLayer()
    plain.update_conv_state(expected[0])
    plain.update_recurrent_state(expected[1])
    layer, num_passed = StatesLayer.of(plain), 0
    for at, (num_rows, num_wrong, keeps, by_module) in enumerate(steps):
        tokens = [7 * at + row for row in range(num_rows)]
        if keeps:
            layer.keep_next()
        write_states(layer, tokens, by_module=by_module)
        kept = num_rows
        if keeps:
            kept -= min(num_wrong, num_rows)
            layer.roll_back(num_rows - kept)
        for token in tokens[:kept]:
            expected = moved(expected, token)
        num_passed += kept
        assert layer.num_passed == num_passed
        assert all(map(torch.equal, present(layer), expected))


def test_states_that_other_code_replaces_are_gone_on_from() -> None:
    layer = StatesLayer()
    layer.update_conv_state(torch.ones(STATES[0]))
    layer.update_recurrent_state(torch.ones(STATES[1]))
    for _ in range(2):
        layer.keep_next()
        write_states(layer, [1, 2], by_module=False)
        layer.reorder_cache(torch.tensor([0]))
    expected = [torch.ones(shape) for shape in STATES]
    for token in (1, 2, 1, 2):
        expected = moved(expected, token)
    assert all(map(torch.equal, present(layer), expected))
    assert all(len(ring) == NUM_PLACES for ring in layer.rings)
