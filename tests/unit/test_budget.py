"""Slots from budgets, and sizes as people write them."""

from pathlib import Path

import pytest

from offload_moe.budget import DEVICE_RESERVE_BYTES, RUNTIME_BYTES, _free_in_groups, free_ram, plan_slots
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


def write_group(folder: Path, limit: str, usage: int, inactive: int, *, is_v2: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, usage_name = (
        ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"cache 5\n{'' if is_v2 else 'total_'}inactive_file {inactive}\n")


@pytest.mark.parametrize("is_v2", [True, False])
def test_container_limits_count_and_droppable_cache_is_free(is_v2: bool, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    top = root if is_v2 else root / "memory"
    write_group(top / "pod", "1000", 300, 50, is_v2=is_v2)
    write_group(top / "pod/task", "max" if is_v2 else str(2**63 - 4096), 200, 0, is_v2=is_v2)
    membership = tmp_path / "membership"
    membership.write_text("0::/pod/task\n" if is_v2 else "4:cpu:/x\n3:memory:/pod/task\n")
    assert min(_free_in_groups(root, membership)) == 1000 - 300 + 50


def test_no_container_no_limit(tmp_path: Path) -> None:
    assert min(_free_in_groups(tmp_path, tmp_path / "none")) > 2**60
