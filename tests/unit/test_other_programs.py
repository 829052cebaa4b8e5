"""VRAM that other programs take: slots give way at once, come back later, and do not flutter."""

import logging

import pytest
from transformers import DynamicCache

from offload_moe.errors import BudgetError
from offload_moe.memory.copier import DeviceMemory
from offload_moe.plan.others import BACK_AFTER_S, LOOK_EVERY_S, OtherPrograms
from tests.unit.test_context_room import CONTEXT, Forwards

KEPT, SWAY, USED, PLANNED, FREE = 100, 40, 3000, 500, 1000  # bytes of a small card


class Card:
    """Its memory as the process sees it, and a clock."""

    def __init__(self, free: int = FREE) -> None:
        self.available, self.now, self.num_measured = USED + PLANNED + free, 0.0, 0
        self.at_load = self.available
        self.is_lost = False

    def measure(self) -> DeviceMemory:
        self.num_measured += 1
        if self.is_lost:
            raise BudgetError("does not report its memory")
        return DeviceMemory(available_bytes=self.available, used_bytes=USED)

    def others(self) -> OtherPrograms:
        """Behind the first answer."""
        others = self.at_first()
        others.settle()
        return others

    def at_first(self) -> OtherPrograms:
        return OtherPrograms(self.measure, PLANNED, clock=lambda: self.now, kept_bytes=KEPT, sway_bytes=SWAY)

    def look(self, others: OtherPrograms, taken: int, after_s: float = LOOK_EVERY_S) -> int:
        """What slots give up once others have so much."""
        self.available, self.now = self.at_load - taken, self.now + after_s
        before = others.num_bytes
        assert others.look(now=False) == (others.num_bytes != before)
        return others.num_bytes


def test_slots_give_way_once_less_is_free_than_is_kept() -> None:
    card = Card()
    others = card.others()
    assert card.look(others, FREE - KEPT) == 0
    assert card.look(others, FREE - KEPT + 1) == 1 + SWAY
    assert card.look(others, FREE + 200) == 200 + KEPT + SWAY


def test_they_come_back_when_memory_was_free_for_some_time() -> None:
    card = Card()
    others = card.others()
    first = card.look(others, FREE)
    for taken in (FREE - SWAY, FREE + SWAY, FREE - 2 * SWAY + 1, FREE):  # to and fro
        assert card.look(others, taken, BACK_AFTER_S) == first
    assert card.look(others, FREE - 2 * SWAY) == first
    assert card.look(others, FREE - 2 * SWAY, BACK_AFTER_S) == first - 2 * SWAY
    assert card.look(others, 0) > 0
    assert card.look(others, FREE - KEPT) > 0  # again, so the time begins anew
    assert card.look(others, 0, BACK_AFTER_S) > 0
    assert card.look(others, 0, BACK_AFTER_S) == 0


def test_a_card_that_was_full_at_load_gives_up_what_is_taken() -> None:
    card = Card(free=0)
    others = card.others()
    assert card.look(others, 7) == 7
    assert card.look(others, 0) == 7
    assert card.look(others, 0, BACK_AFTER_S) == 0


@pytest.mark.parametrize("num_own", [0, KEPT, FREE - KEPT // 2, FREE])
def test_what_the_process_takes_for_its_first_answer_is_not_another_programs(num_own: int) -> None:
    """Graphs and code of kernels, past torch's allocator: slots give way only to what is taken of planned memory."""
    card = Card()
    others = card.at_first()
    assert card.look(others, num_own) == 0
    others.settle()
    reserve = min(KEPT, (FREE - num_own) // 2)
    assert card.look(others, FREE - reserve) == 0
    assert card.look(others, FREE - reserve + 1) == 1 + min(SWAY, reserve // 2)


def test_planned_memory_is_kept_in_the_first_answer_too() -> None:
    card = Card()
    others = card.at_first()
    assert card.look(others, FREE + 1) == 1 + SWAY
    others.settle()  # not what others have taken
    assert card.look(others, 0) == card.look(others, FREE) == 1 + SWAY
    assert card.look(others, 0) > card.look(others, 0, BACK_AFTER_S) == 0
    others.settle()
    assert card.look(others, FREE - KEPT + 1) == 1 + SWAY


def test_the_driver_is_asked_seldom_unless_much_is_about_to_be_taken() -> None:
    card = Card()
    others = card.others()
    for _ in range(100):
        card.look(others, FREE, LOOK_EVERY_S / 10)
    assert card.num_measured <= 12
    before = card.num_measured
    others.look(now=True)
    assert card.num_measured == before + 1


def test_a_card_that_reports_nothing_any_more_changes_nothing() -> None:
    card = Card()
    others = card.others()
    first = card.look(others, FREE)
    card.is_lost = True
    assert not others.look(now=True)
    assert others.num_bytes == first


class Shared(Forwards):
    """A pool on a card of which others take `taken` bytes, beyond what was free."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.now = 0, 0.0
        self.room.others = OtherPrograms(self._measure, self.room.planned_bytes, clock=lambda: self.now)

    def step(self, cache: DynamicCache, num_new: int) -> None:
        self.now += LOOK_EVERY_S
        super().step(cache, num_new)

    def _measure(self) -> DeviceMemory:
        used = self.slots * self.placement.fast.slot_bytes
        at_load = self.placement.fast.num_slots * self.placement.fast.slot_bytes
        return DeviceMemory(available_bytes=at_load + self.room.planned_bytes - self.taken, used_bytes=used)


@pytest.fixture
def shared() -> Shared:
    return Shared()


def test_slots_make_room_for_context_and_others_and_a_line_says_so(
    shared: Shared, caplog: pytest.LogCaptureFixture
) -> None:
    cache, slot = DynamicCache(), shared.placement.fast.slot_bytes
    shared.step(cache, CONTEXT - 8)
    shared.step(cache, 1)
    assert shared.slots == 18
    shared.taken = shared.room.planned_bytes - shared.room.needed_bytes(CONTEXT, 1) + 3 * slot
    with caplog.at_level(logging.INFO, logger="offload_moe.plan.room"):
        shared.step(cache, 1)
        assert shared.slots == 15
        for _ in range(3):
            shared.step(cache, 1)
    assert shared.room.num_slots_lost == 3
    assert shared.room.num_slots_given_up == 0
    (line,) = caplog.messages
    assert line.startswith("Other programs have taken VRAM: 3 expert slots (")
    assert "15 are left" in line


def test_other_programs_refuse_no_context_and_leave_the_slots_of_a_token(shared: Shared) -> None:
    alone, cache = Forwards(), DynamicCache()
    shared.taken = 1 << 40
    shared.step(cache, 50)
    assert shared.slots == 6
    while cache.get_seq_length() < alone.room.limit(50, 50):
        shared.step(cache, 1)
    assert shared.slots == 6


def test_slots_do_not_come_back_behind_each_prompt_while_memory_is_short(shared: Shared) -> None:
    cache = DynamicCache()
    shared.taken = 5 * shared.placement.fast.slot_bytes + shared.room.planned_bytes
    seen = []
    for _ in range(4):
        shared.step(cache, 10)
        shared.step(cache, 1)
        seen.append(shared.slots)
    assert seen[0] < 18
    assert len(set(seen)) == 1


def test_a_growth_that_is_refused_is_tried_again_and_is_no_recovery(
    shared: Shared, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DynamicCache()
    shared.step(cache, 10)
    shared.taken = 5 * shared.placement.fast.slot_bytes + shared.room.planned_bytes
    shared.step(cache, 1)
    few = shared.slots
    shared.taken, shared.is_busy = 0, True
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="offload_moe.plan.room"):
        for _ in range(4):
            shared.now += BACK_AFTER_S
            shared.step(cache, 1)
        assert shared.slots == few
        assert shared.room.num_slots_lost > 0
        assert not caplog.messages
        shared.is_busy = False
        for _ in range(2):
            shared.now += BACK_AFTER_S
            shared.step(cache, 1)
        assert shared.slots == 18
        assert caplog.messages == ["That VRAM is free again: 18 expert slots are in use."]


def test_slots_that_another_thread_uses_are_given_up_at_the_next_step_that_can(shared: Shared) -> None:
    cache = DynamicCache()
    shared.step(cache, CONTEXT - 8)
    shared.step(cache, 1)
    shared.taken, shared.is_busy = 3 * shared.placement.fast.slot_bytes + shared.room.planned_bytes, True
    for _ in range(3):
        shared.step(cache, 1)
    assert shared.slots == 18
    shared.is_busy = False
    Forwards.step(shared, cache, 1)  # no time has gone by, so nothing is measured
    assert shared.slots < 15
    assert shared.room.num_slots_lost == 18 - shared.slots


def test_memory_that_contexts_take_later_is_no_recovery(shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
    """Slots that others took are counted as given up once contexts would take them too."""
    cache, room = DynamicCache(), shared.room
    shared.step(cache, 10)
    shared.taken = 1 << 40
    shared.step(cache, 1)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="offload_moe.plan.room"):
        shared.step(cache, next(n for n in range(500) if room.slots_for(11 + n, n) == 6))
    assert room.num_slots_lost == 0
    assert not caplog.messages


def test_where_nothing_is_reported_nothing_is_watched() -> None:
    card, forwards = Card(), Forwards()
    card.is_lost = True
    forwards.room.watch(card.measure)
    assert forwards.room.others is None
    forwards.step(DynamicCache(), 10)
