"""Contexts that outgrow the plan: slots give way in time, and what cannot have room is refused with the numbers."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from offload_moe.errors import BudgetError, TransferError
from offload_moe.families.cache_name import CACHE
from offload_moe.plan import room
from offload_moe.plan.budget import CPU_PROMPT_TOKENS
from offload_moe.plan.machine import Machine
from offload_moe.plan.outlook import look_ahead
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.placement import Placement
from offload_moe.plan.room import ContextRoom
from offload_moe.plan.working import activation_bytes, cache_bytes
from tests.support.plan import GIB, task, tiny_shape

SHAPE = tiny_shape("mixtral", max_position_embeddings=100_000)  # 3 layers of 6 experts, top-2
CONTEXT = 128
MANY_EXPERTS = tiny_shape("mixtral", max_position_embeddings=100_000, num_local_experts=200)  # more than fit


def place_with(ram: int, context: int = CONTEXT, shape: ModelShape = SHAPE) -> Placement:
    return look_ahead(task(shape, Machine(ram_bytes=ram), context=context, dense_codec="bf16")).placement


class Forwards:
    """A room, the slots it leaves, and forwards that need no model."""

    shape = SHAPE
    draft_token_bytes = 0

    def __init__(self, left_over: int = 0) -> None:
        """left_over: bytes of the budget that neither slots nor anything else is planned to use."""
        self._begin(place_with(place_with(GIB).fast.bytes_with(18) + left_over), borrows=False)

    def _begin(self, placement: Placement, *, borrows: bool) -> None:
        self.placement = placement
        self.slots = self.placement.fast.num_slots
        self.num_resizes = 0
        self.is_busy = False  # another thread has leased all slots
        self.room = ContextRoom(
            self.shape,
            torch.float32,
            placement,
            self._resize,
            borrows=borrows,
            draft_token_bytes=self.draft_token_bytes,
        )

    def step(self, cache: DynamicCache, num_new: int) -> None:
        ids = torch.zeros(1, num_new, dtype=torch.long)
        self.room.before_forward(None, (), {"input_ids": ids, CACHE: cache})
        states = torch.zeros(1, 1, num_new, 1)
        cache.update(states, states, 0)

    def read(self, cache: DynamicCache, num_new: int) -> None:
        """A prompt, in chunks."""
        for first in range(0, num_new, CPU_PROMPT_TOKENS):
            self.step(cache, min(CPU_PROMPT_TOKENS, num_new - first))

    def _resize(self, num_slots: int) -> int:
        if self.is_busy:
            raise TransferError("Some slots are still leased.")
        self.num_resizes += 1
        self.slots = num_slots
        return num_slots

    def budget_is_kept(self, *caches: DynamicCache, num_new: int = 0) -> bool:
        """num_new: of the forward that comes, whose activations count too."""
        kept = self.placement.cache_dtype
        held = sum(cache_bytes(self.shape, cache.get_seq_length(), torch.float32, kept=kept) for cache in caches)
        held += sum(cache.get_seq_length() for cache in caches) * self.draft_token_bytes
        if num_new:
            length = caches[-1].get_seq_length()
            held += activation_bytes(self.shape, length, torch.float32, kept=kept, num_new=num_new)
        fast = self.placement.fast
        used = fast.fixed_bytes + self.slots * fast.slot_bytes
        planned = sum(part.num_bytes for part in fast.fixed if part.name in ("key/value cache", "activations"))
        planned += self.placement.context * self.draft_token_bytes
        return used - planned + held <= fast.used_bytes


@pytest.fixture
def forwards() -> Forwards:
    return Forwards()


class Borrowing(Forwards):
    """Planned beside 2,000 tokens: slots for 50 of 600 experts."""

    shape = MANY_EXPERTS

    def __init__(self, num_slots: int = 50, *, borrows: bool = True) -> None:
        ram = place_with(GIB, 2000, self.shape).fast.bytes_with(num_slots)
        self._begin(place_with(ram, 2000, self.shape), borrows=borrows)


@pytest.fixture
def borrowing(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    monkeypatch.setattr(room, "NEVER_BORROWED_BYTES", 0)
    monkeypatch.setattr(room, "DOUBT", 0.0)
    return Borrowing()


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
    caches = [DynamicCache() for _ in range(9)]
    for cache in caches:
        forwards.step(cache, 40)
        assert forwards.budget_is_kept(*caches[: caches.index(cache) + 1])
    assert forwards.slots < 18
    assert forwards.room.limit(20, 20) < Forwards().room.limit(20, 20)


class Drafting(Forwards):
    """Beside a draft model, whose caches are as large."""

    draft_token_bytes = 384

    def __init__(self) -> None:
        plain = place_with(GIB).fast.bytes_with(18) + self._draft_bytes(CONTEXT)
        machine = Machine(ram_bytes=plain)
        drafted = task(SHAPE, machine, context=CONTEXT, dense_codec="bf16", draft_bytes=self._draft_bytes)
        self._begin(look_ahead(drafted).placement, borrows=False)

    def _draft_bytes(self, context: int) -> int:
        return 100_000 + context * self.draft_token_bytes


def test_the_drafts_caches_of_several_conversations_count() -> None:
    plain, drafting = Forwards(), Drafting()
    assert drafting.slots == plain.slots == 18
    assert num_admitted(drafting) <= num_admitted(plain) - 3


def num_admitted(forwards: Forwards) -> int:
    """Conversations of 40 tokens that have room at once."""
    caches = list[DynamicCache]()
    with pytest.raises(BudgetError):
        while True:
            forwards.step(cache := DynamicCache(), 40)
            caches.append(cache)
            assert forwards.budget_is_kept(*caches)
    return len(caches)


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
        BudgetError, match=r"The conversation of 90,000 tokens needs \d+ MiB .* \d+ (MiB|KiB) is available"
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
    forwards.room.before_forward(None, (), {"input_ids": torch.zeros(1, 9999), CACHE: None})
    forwards.room.before_forward(None, (), {CACHE: SimpleNamespace()})
    assert forwards.slots == 18


def test_slots_borrow_what_a_context_does_not_need_yet_and_give_it_back_in_time(borrowing: Forwards) -> None:
    cache, seen = DynamicCache(), []
    borrowing.step(cache, 100)
    assert borrowing.budget_is_kept(cache, num_new=100)
    for _ in range(100, 2000):
        borrowing.step(cache, 1)
        assert borrowing.budget_is_kept(cache, num_new=1)
        seen.append(borrowing.slots)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 200 > seen[-1] >= 50
    assert borrowing.num_resizes <= 17
    assert borrowing.room.num_slots_given_up == 0


def test_a_prompt_finds_the_room_for_its_activations(borrowing: Forwards) -> None:
    cache = DynamicCache()
    borrowing.read(cache, 600)
    borrowing.step(cache, 1)
    decoding = borrowing.slots
    borrowing.step(cache, 512)
    assert 50 <= borrowing.slots < decoding
    assert borrowing.budget_is_kept(cache, num_new=512)
    borrowing.step(cache, 1)
    assert borrowing.slots > 50


def test_a_forward_without_a_cache_takes_back_what_was_borrowed_and_no_more(borrowing: Forwards) -> None:
    cache = DynamicCache()
    borrowing.step(cache, 10)
    borrowing.step(cache, 1)
    assert borrowing.slots > 50
    borrowing.room.before_forward(None, (torch.zeros(1, 9999),), {CACHE: None})
    assert borrowing.slots == 50
    borrowing.step(cache, 1)
    assert borrowing.slots > 50


def test_what_one_conversation_borrowed_another_takes_back(borrowing: Forwards) -> None:
    caches = [DynamicCache() for _ in range(3)]
    for cache in caches:
        borrowing.read(cache, 600)
        borrowing.step(cache, 1)
        assert borrowing.budget_is_kept(*caches[: caches.index(cache) + 1], num_new=1)
    borrowing.step(caches[0], 1)
    assert borrowing.budget_is_kept(*caches, num_new=1)


def test_a_cropped_cache_is_counted_whole_until_half_of_it_is_empty(borrowing: Forwards) -> None:
    cache = DynamicCache()
    borrowing.read(cache, 1900)
    borrowing.step(cache, 1)
    slots = borrowing.slots
    cache.crop(-500)
    borrowing.step(cache, 1)
    assert borrowing.slots == slots
    cache.crop(-900)
    borrowing.step(cache, 1)
    assert borrowing.slots > slots


def test_slots_that_another_thread_holds_come_back_later(borrowing: Forwards) -> None:
    cache = DynamicCache()
    borrowing.step(cache, 10)
    borrowed = borrowing.slots
    borrowing.is_busy = True
    borrowing.read(cache, 1900)
    assert borrowing.slots == borrowing.room.num_slots == borrowed
    borrowing.is_busy = False
    borrowing.step(cache, 64)
    assert 50 <= borrowing.slots == borrowing.room.num_slots < borrowed
    assert borrowing.budget_is_kept(cache, num_new=64)


def test_some_room_is_never_lent() -> None:
    forwards = Borrowing()
    forwards.step(DynamicCache(), 10)
    assert forwards.room.planned_bytes < room.NEVER_BORROWED_BYTES
    assert forwards.num_resizes == 0


def test_nothing_is_borrowed_unless_set_or_where_every_expert_has_a_slot(borrowing: Forwards) -> None:
    for forwards in (Borrowing(borrows=False), Borrowing(600)):
        forwards.step(DynamicCache(), 10)
        assert forwards.num_resizes == 0


def test_rows_of_a_decode_step_count_as_one(borrowing: Forwards) -> None:
    cache = DynamicCache()
    borrowing.read(cache, 100)
    borrowing.step(cache, 1)
    slots, num_resizes = borrowing.slots, borrowing.num_resizes
    for num_rows in (8, 1, 3, 8, 2):
        borrowing.step(cache, num_rows)
    assert (borrowing.slots, borrowing.num_resizes) == (slots, num_resizes)
    assert borrowing.num_resizes > 0
    borrowing.step(cache, 60)  # a prompt
    assert borrowing.num_resizes > num_resizes
