"""Contexts that outgrow the plan: slots give way in time, and what cannot have room is refused with the numbers."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from offload_moe.errors import BudgetError
from offload_moe.plan.machine import Machine
from offload_moe.plan.outlook import look_ahead
from offload_moe.plan.placement import Placement
from offload_moe.plan.room import ContextRoom
from offload_moe.plan.working import activation_bytes, cache_bytes
from tests.support.plan import GIB, task, tiny_shape

SHAPE = tiny_shape("mixtral", max_position_embeddings=100_000)  # 3 layers of 6 experts, top-2
CONTEXT = 128


def place_with(ram: int) -> Placement:
    return look_ahead(task(SHAPE, Machine(ram_bytes=ram), context=CONTEXT, dense_codec="bf16")).placement


class Forwards:
    """A room, the slots it leaves, and forwards that need no model."""

    def __init__(self, left_over: int = 0) -> None:
        """left_over: bytes of the budget that neither slots nor anything else is planned to use."""
        ram = place_with(GIB).fast.bytes_with(18) + left_over
        self.placement = place_with(ram)
        self.slots = self.placement.fast.num_slots
        self.room = ContextRoom(SHAPE, torch.float32, self.placement, self._resize)

    def step(self, cache: DynamicCache, num_new: int) -> None:
        ids = torch.zeros(1, num_new, dtype=torch.long)
        self.room.before_forward(None, (), {"input_ids": ids, "past_key_values": cache})
        states = torch.zeros(1, 1, num_new, 1)
        cache.update(states, states, 0)

    def _resize(self, num_slots: int) -> int:
        self.slots = num_slots
        return num_slots

    def budget_is_kept(self, *caches: DynamicCache) -> bool:
        held = sum(cache_bytes(SHAPE, cache.get_seq_length(), torch.float32) for cache in caches)
        fast = self.placement.fast
        used = fast.fixed_bytes + self.slots * fast.slot_bytes
        planned = sum(part.num_bytes for part in fast.fixed if part.name in ("key/value cache", "activations"))
        return used - planned + held <= fast.used_bytes


@pytest.fixture
def forwards() -> Forwards:
    return Forwards()


def test_nothing_moves_within_the_planned_context(forwards: Forwards) -> None:
    cache = DynamicCache()
    forwards.step(cache, CONTEXT - 8)
    for _ in range(8):
        forwards.step(cache, 1)
    assert forwards.slots == 18
    assert forwards.room.num_slots_given_up == 0


def test_slots_give_way_before_the_cache_grows_and_come_back_afterwards(forwards: Forwards) -> None:
    cache, seen = DynamicCache(), []
    forwards.step(cache, CONTEXT)
    for _ in range(CONTEXT, forwards.room.limit(CONTEXT, 1, cache)):
        forwards.step(cache, 1)
        assert forwards.budget_is_kept(cache)
        seen.append(forwards.slots)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 18
    assert forwards.room.num_slots_given_up == 18 - seen[-1]
    del cache
    forwards.step(DynamicCache(), 10)
    assert forwards.slots == 18


def test_what_the_budget_has_left_goes_first() -> None:
    tight, ample = Forwards(), Forwards(left_over=1 << 20)
    assert ample.placement.fast.num_slots == tight.placement.fast.num_slots == 18
    assert ample.room.limit(50, 50) > tight.room.limit(50, 50)
    cache = DynamicCache()
    ample.step(cache, 50)
    for _ in range(50, tight.room.limit(50, 50)):
        ample.step(cache, 1)
    assert ample.slots == 18


def test_conversations_share_the_room(forwards: Forwards) -> None:
    caches = [DynamicCache() for _ in range(4)]
    for cache in caches:
        forwards.step(cache, 40)
        assert forwards.budget_is_kept(*caches[: caches.index(cache) + 1])
    assert forwards.slots < 18
    assert forwards.room.limit(20, 20) < Forwards().room.limit(20, 20)


def test_the_limit_is_the_longest_conversation_that_fits(forwards: Forwards) -> None:
    limit = forwards.room.limit(50, 50)
    assert CONTEXT < limit < 100_000
    cache = DynamicCache()
    forwards.step(cache, 50)
    while cache.get_seq_length() < limit:
        forwards.step(cache, 1)
    assert forwards.slots >= 6  # the top-k of every layer
    with pytest.raises(BudgetError, match=r"tokens of context need .* Raise --ram"):
        for _ in range(256):
            forwards.step(cache, 1)


def test_a_prompt_without_room_is_refused_with_the_numbers(forwards: Forwards) -> None:
    with pytest.raises(
        BudgetError, match=r"The conversation of 90,000 tokens needs \d+ MiB .* \d+ (MiB|KiB) can be had"
    ):
        forwards.room.limit(90_000, 90_000)
    assert forwards.room.limit(50, 50) > 50


def test_a_prompt_counts_the_activations_of_its_new_tokens(forwards: Forwards) -> None:
    longest = forwards.room.limit(10, 10)
    assert activation_bytes(SHAPE, longest, torch.float32, num_new=longest) > activation_bytes(
        SHAPE, longest, torch.float32, num_new=1
    )
    with pytest.raises(BudgetError):
        forwards.room.limit(longest - 1, longest - 1)
    assert forwards.room.limit(longest - 1, 1) == longest


def test_what_is_no_cache_is_left_alone(forwards: Forwards) -> None:
    forwards.room.before_forward(None, (), {"input_ids": torch.zeros(1, 9999), "past_key_values": None})
    forwards.room.before_forward(None, (), {"past_key_values": SimpleNamespace()})
    assert forwards.slots == 18
