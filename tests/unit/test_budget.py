"""Slots from budgets, and sizes as people write them."""

import pytest

from offload_moe.budget import DEVICE_RESERVE_BYTES, RUNTIME_BYTES, free_ram, plan_slots
from offload_moe.errors import BudgetError, ConfigError
from offload_moe.sizes import format_size, parse_size

MIB = 1 << 20


def test_ram_holds_dense_weights_and_slots_without_a_device() -> None:
    plan = plan_slots(num_records=100, slot_bytes=10 * MIB, dense_bytes=50 * MIB, ram=RUNTIME_BYTES + 125 * MIB)
    assert (plan.num_ram_slots, plan.num_device_slots) == (7, 0)


def test_no_more_slots_than_experts() -> None:
    assert plan_slots(num_records=3, slot_bytes=MIB, dense_bytes=0, ram=8 << 30).num_ram_slots == 3


def test_dense_weights_are_on_the_device_when_there_is_one() -> None:
    plan = plan_slots(
        num_records=100,
        slot_bytes=10 * MIB,
        dense_bytes=50 * MIB,
        ram=RUNTIME_BYTES + 125 * MIB,
        vram=DEVICE_RESERVE_BYTES + 95 * MIB,
        free_vram=8 << 30,
    )
    assert (plan.num_ram_slots, plan.num_device_slots) == (12, 4)


def test_a_budget_below_one_expert_says_what_is_needed() -> None:
    with pytest.raises(BudgetError, match=r"needs 510 MiB of RAM .* budget is 505 MiB\. Raise --ram"):
        plan_slots(num_records=9, slot_bytes=10 * MIB, dense_bytes=50 * MIB, ram=RUNTIME_BYTES + 55 * MIB)


def test_free_ram_is_taken_without_a_budget() -> None:
    assert free_ram() > 0
    assert plan_slots(num_records=10, slot_bytes=MIB, dense_bytes=0).num_ram_slots == 10


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("10GiB", 10 << 30), ("3.5G", 3_500_000_000), ("512 MiB", 512 << 20), ("7", 7), (4096, 4096), ("1kB", 1000)],
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "ten", "-1G", "5X", "1.2.3G", "nan"])
def test_bad_sizes_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="10GiB"):
        parse_size(text)


def test_sizes_are_shown_in_gib() -> None:
    assert format_size(5 << 29) == "2.5 GiB"
    assert format_size(300 << 20) == "300 MiB"
    assert format_size(40960) == "40 KiB"
