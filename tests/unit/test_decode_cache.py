"""The cache with room against transformers' growing one, over every operation a cache is put through."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from offload_moe.decode.cache import STEP, RoomyLayer, RoomySlidingLayer, give_room

OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, STEP)),
    st.tuples(st.just("crop"), st.integers(0, 40)),
    st.tuples(st.just("reorder"), st.integers(0, 5)),
    st.tuples(st.just("select"), st.integers(1, 3)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("extend"), st.integers(1, 8)),
)


def states(batch: int, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, 2, num_tokens, 4, generator=generator)
    return keys, torch.randn(batch, 2, num_tokens, 6, generator=generator)


class Pair:
    """A plain and a roomy layer that live the same life."""

    def __init__(self) -> None:
        self.plain, self.roomy, self.batch = DynamicLayer(), RoomyLayer(), 2

    def extend(self, number: int, seed: int, length: int) -> None:
        assert self.roomy.can_extend == (self.batch == 1 and length > 0)
        if self.roomy.can_extend:
            for index, room in enumerate(self.roomy.extend(number), length):
                new = states(1, 1, seed + index)
                assert room[2] == index
                for place, value in zip(room[:2], new, strict=True):
                    place[:, :, index : index + 1] = value
                self.plain.update(*new)

    def apply(self, name: str, number: int, seed: int) -> None:
        length = self.plain.get_seq_length()
        if name == "update":
            new = states(self.batch, number, seed)
            for got, expected in zip(self.roomy.update(*new), self.plain.update(*new), strict=True):
                assert torch.equal(got, expected)
        elif name == "extend":
            self.extend(number, seed, length)
        elif name == "crop" and number < length:
            self.plain.crop(-number)
            self.roomy.crop(-number)
        elif name == "reorder":
            order = torch.randint(self.batch, (self.batch,), generator=torch.Generator().manual_seed(number))
            self.plain.reorder_cache(order)
            self.roomy.reorder_cache(order)
        elif name == "select" and length:
            chosen = torch.arange(min(number, self.batch))
            self.batch = len(chosen)
            self.plain.batch_select_indices(chosen)
            self.roomy.batch_select_indices(chosen)
        elif name == "repeat" and length and self.batch * number <= 4:
            self.batch *= number
            self.plain.batch_repeat_interleave(number)
            self.roomy.batch_repeat_interleave(number)
        elif name == "copy":
            self.roomy, left_behind = copy.deepcopy(self.roomy), self.roomy
            if length:
                left_behind.update(*states(self.batch, 1, seed + 1))  # must not reach the copy
        elif name == "reset":
            self.plain.reset()
            self.roomy.reset()

    def check(self) -> None:
        assert self.roomy.get_seq_length() == self.plain.get_seq_length()
        assert self.roomy.get_mask_sizes(3) == self.plain.get_mask_sizes(3)
        if self.plain.get_seq_length():
            assert torch.equal(self.roomy.keys, self.plain.keys)
            assert torch.equal(self.roomy.values, self.plain.values)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATIONS, max_size=14))
def test_it_holds_what_the_growing_layer_holds(operations: list[tuple[str, int]]) -> None:
    pair = Pair()
    for seed, (name, number) in enumerate(operations):
        pair.apply(name, number, seed)
        pair.check()


def test_a_decode_step_writes_in_place() -> None:
    layer = RoomyLayer()
    layer.update(*states(1, 10, 0))
    places = [layer.keys.data_ptr(), layer.values.data_ptr()]
    for step in range(STEP - 10):
        layer.update(*states(1, 1, step))
        assert [layer.keys.data_ptr(), layer.values.data_ptr()] == places
    layer.update(*states(1, 1, 0))
    assert layer.keys.data_ptr() != places[0]
    assert layer.get_seq_length() == STEP + 1


def test_a_cropped_cache_gives_its_room_back_once_half_of_it_is_empty() -> None:
    layer = RoomyLayer()
    layer.update(*states(1, 4 * STEP, 0))
    room = layer.keys.untyped_storage().nbytes()
    layer.crop(-STEP)
    assert layer.keys.untyped_storage().nbytes() == room
    layer.crop(-STEP)
    assert layer.keys.untyped_storage().nbytes() < room
    assert torch.equal(layer.keys, states(1, 4 * STEP, 0)[0][:, :, : 2 * STEP])


def test_a_cache_from_inference_mode_goes_on_outside() -> None:
    layer = RoomyLayer()
    with torch.inference_mode():
        layer.update(*states(1, 3, 0))
    layer.update(*states(1, 1, 1))
    assert torch.equal(layer.keys, torch.cat([states(1, 3, 0)[0], states(1, 1, 1)[0]], dim=2))


def test_gradients_flow_through_it() -> None:
    layer = RoomyLayer()
    keys, values = states(1, 2, 0)
    keys.requires_grad_()
    layer.update(keys, values)
    layer.update(*states(1, 1, 1))
    layer.keys.sum().backward()
    assert keys.grad is not None
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_only_layers_that_grow_or_slide_get_room() -> None:
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4), DummyLayer()]
    cache.layers[0].update(*states(1, 3, 0))
    give_room(cache)
    assert [type(layer) for layer in cache.layers] == [RoomyLayer, RoomySlidingLayer, DummyLayer]
    assert cache.get_seq_length() == 3
    cache.update(*states(1, 1, 1), 3)
    assert type(cache.layers[3]) is RoomyLayer


class SlidingPair(Pair):
    """A plain and a roomy window."""

    def __init__(self, window: int, *, is_recording: bool) -> None:
        self.plain, self.roomy, self.batch = DynamicSlidingWindowLayer(window), RoomySlidingLayer(window), 1
        if is_recording:
            self.plain.activate_past_recording()
            self.roomy.activate_past_recording()

    def extend(self, number: int, seed: int, length: int) -> None:
        assert self.roomy.can_extend == (self.batch == 1 and length > 0 and not self.roomy.record_past)
        if not self.roomy.can_extend:
            return
        rows = [(*room, states(1, 1, seed + index)) for index, room in enumerate(self.roomy.extend(number))]
        for *room, num_seen, new in rows:  # all are written before one is read
            for place, value in zip(room, new, strict=True):
                place[:, :, num_seen : num_seen + 1] = value
        for index, (*room, num_seen, new) in enumerate(rows, length):
            assert num_seen == min(index, self.roomy.sliding_window - 1)
            for place, expected in zip(room, self.plain.update(*new), strict=True):
                assert torch.equal(place[:, :, : num_seen + 1], expected)

    def apply(self, name: str, number: int, seed: int) -> None:
        is_full = self.plain.get_seq_length() >= self.plain.sliding_window
        if name != "crop" or not is_full or self.plain.record_past:
            super().apply(name, number, seed)


@settings(max_examples=100, deadline=None)
@given(st.lists(OPERATIONS, max_size=14), st.integers(3, 7), st.booleans(), st.integers(0, 300))
def test_a_window_holds_what_the_sliding_layer_holds(
    operations: list[tuple[str, int]], window: int, is_recording: bool, num_steps: int
) -> None:
    pair = SlidingPair(window, is_recording=is_recording)
    steps = [("extend" if step % 3 else "update", 1) for step in range(num_steps)]
    for seed, (name, number) in enumerate([*operations, *steps, *operations]):
        pair.apply(name, number, seed)
        pair.check()


def test_a_window_moves_through_its_room_in_place() -> None:
    layer = RoomySlidingLayer(4)
    layer.update(*states(1, 10, 0))
    layer.update(*states(1, 1, 1))
    place = layer.keys.data_ptr()
    for step in range(STEP - 10):
        layer.update(*states(1, 1, step))
        assert layer.keys.data_ptr() == place + (step + 1) * layer.keys.stride(2) * 4
    assert layer.keys.untyped_storage().nbytes() <= 2 * STEP * 2 * 6 * 4


@pytest.mark.parametrize("kind", [DynamicLayer, partial(DynamicSlidingWindowLayer, 6)])
def test_a_token_is_given_the_place_where_its_chunk_begins(kind: Any) -> None:
    """Chunks of 6: behind 4, passes of 3, 5 and 1 tokens."""
    cache = DynamicCache()
    cache.layers = [kind()]
    cache.update(*states(1, 4, 0), 0)
    give_room(cache)
    layer, begin = cache.layers[0], 4
    for num_tokens in (3, 5, 1):
        fields = layer.places(num_tokens, 6)
        keys, values, last = layer.place
        for row in range(num_tokens):
            key_address, value_address, _, length = fields[4 * row : 4 * row + 4]
            own = last - num_tokens + 1 + row
            assert length == (begin + row) % 6
            assert key_address == keys[0, 0, own - length].data_ptr()
            assert value_address == values[0, 0, own - length].data_ptr()
        begin += num_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_keeps_the_dtype(dtype: torch.dtype) -> None:
    layer = RoomyLayer()
    keys, values = states(1, 3, 0)
    got, _ = layer.update(keys.to(dtype), values.to(dtype))
    assert got.dtype == dtype


def rounded(states: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [part.bfloat16().float() for part in states]


@pytest.mark.parametrize("window", [None, 7])
def test_states_are_rounded_as_they_enter_whatever_they_are_cut_into(window: int | None) -> None:
    """Chunks read their own states rounded, too."""
    whole, results = states(1, 12, 0), []
    for cuts in ([12], [5, 7], [1] * 12, [3, 1, 8]):
        layer = RoomyLayer(kept=torch.bfloat16) if window is None else RoomySlidingLayer(window, torch.bfloat16)
        first = 0
        for num_new in cuts:
            new = tuple(part[:, :, first : first + num_new] for part in whole)
            seen = layer.update(*new)
            first += num_new
            num_seen = first if window is None else min(first, window - 1 + num_new)
            for got, part in zip(seen, rounded(whole), strict=True):
                assert got.dtype == torch.float32
                assert torch.equal(got, part[:, :, first - num_seen : first])
        results.append([layer.keys, layer.values])
    assert all(part.dtype == torch.bfloat16 for parts in results for part in parts)
    assert all(torch.equal(a, b) for parts in results[1:] for a, b in zip(parts, results[0], strict=True))


@pytest.mark.parametrize("window", [None, 40])
def test_a_cache_in_bf16_has_half_the_bytes(window: int | None) -> None:
    def num_bytes(kept: torch.dtype | None) -> int:
        layer = RoomyLayer(kept=kept) if window is None else RoomySlidingLayer(window, kept)
        for seed in range(3):
            layer.update(*states(1, 30, seed))
            layer.update(*states(1, 1, seed))
        assert layer.kept_dtype == (kept or torch.float32)
        return layer.keys.untyped_storage().nbytes()

    assert 2 * num_bytes(torch.bfloat16) == num_bytes(None)


def test_room_that_is_given_later_rounds_what_is_there() -> None:
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=8)]
    for layer in cache.layers:
        layer.update(*states(1, 5, 0))
    give_room(cache, kept=torch.bfloat16)
    for layer in cache.layers:
        assert torch.equal(layer.update(*states(1, 1, 1))[0][:, :, :5], rounded(states(1, 5, 0))[0])
        ((keys, _, length),) = layer.extend()
        assert (keys.dtype, length) == (torch.bfloat16, 6)
    cache.update(*states(1, 2, 2), 2)
    assert (type(cache.layers[2]), cache.layers[2].keys.dtype) == (RoomyLayer, torch.bfloat16)


@pytest.mark.parametrize("make", [partial(RoomyLayer), partial(RoomySlidingLayer, 8)])
def test_gradients_flow_through_a_cache_in_bf16(make: Any) -> None:
    layer = make(kept=torch.bfloat16)
    keys, values = states(1, 2, 0)
    layer.update(keys, values)
    keys.requires_grad_()
    layer.update(keys, values)[0].sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))
    layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    assert torch.equal(
        layer.update(*states(1, 1, 1))[0], torch.cat([*rounded((keys.detach(),) * 2), rounded(states(1, 1, 1))[0]], 2)
    )
    assert layer.extend()[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", [RoomyLayer, partial(RoomySlidingLayer, 64)])
@pytest.mark.parametrize("num_cropped", [0, 3])
def test_a_copy_is_written_to_in_a_room_of_its_own(make: Any, kind: Any, num_cropped: int) -> None:
    """By addresses, as native calls write: the original's next token has another place than the copy's."""
    layer = kind()
    layer.update(*states(1, 9, 0))
    layer.places(90)
    for room in layer.place[:2]:
        room.fill_(0.5)  # memory as it is found may have NaN, which equals nothing
    twin = make(layer)
    assert torch.equal(twin.keys, layer.keys)
    if num_cropped and kind is RoomyLayer:
        twin.crop(-num_cropped)
    for grown, other in ((twin, layer), (layer, twin)):
        keys_address, values_address, *_ = grown.places(1)
        for address, room, foreign in zip((keys_address, values_address), grown.place, other.place, strict=False):
            assert room.data_ptr() <= address < room.data_ptr() + room.nbytes
            assert not foreign.data_ptr() <= address < foreign.data_ptr() + foreign.nbytes
