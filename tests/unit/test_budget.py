"""Slots from budgets, and sizes as people write them."""

from pathlib import Path

import pytest

from offload_moe.errors import ConfigError
from offload_moe.plan.budget import RUNTIME_BYTES, default_ram, free_in_groups, free_ram
from offload_moe.system.sizes import format_size, parse_size, typed_size


def test_without_a_budget_most_of_what_is_free_is_taken() -> None:
    free = free_ram()
    assert 0 < default_ram() <= free + RUNTIME_BYTES


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("10GiB", 10 << 30),
        ("3.5G", 3_500_000_000),
        ("512 MiB", 512 << 20),
        ("7B", 7),
        ("0", 0),
        (4096, 4096),
        ("1kB", 1e3),
    ],
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "ten", "-1G", "5X", "1.2.3G", "nan"])
def test_bad_sizes_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="10GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "meant"), [("64", "64GiB"), ("1.5", "1.5GiB"), (" 8 ", "8GiB"), ("492259648", "492259648B")]
)
def test_a_size_needs_a_unit(text: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"has no unit. Did you mean {meant}"):
        parse_size(text)


@pytest.mark.parametrize("size", ["1" + "0" * 400 + "GiB", "99999TiB", -1, 1 << 60])
def test_sizes_that_no_memory_has_are_refused(size: str | int) -> None:
    with pytest.raises(ConfigError, match="not a size of a memory"):
        parse_size(size)


def test_sizes_are_shown_in_gib() -> None:
    assert format_size(5 << 29) == "2.5 GiB"
    assert format_size(300 << 20) == "300 MiB"
    assert format_size(40960) == "40 KiB"


def test_sizes_to_be_typed_are_rounded_to_the_safe_side() -> None:
    assert (typed_size(3_700_000_000), typed_size(3_700_000_000, is_least=True)) == ("3.4GiB", "3.5GiB")
    assert parse_size(typed_size(5 << 29)) == 5 << 29


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
    assert min(free_in_groups(root, membership)) == 1000 - 300 + 50


def test_no_container_no_limit(tmp_path: Path) -> None:
    assert min(free_in_groups(tmp_path, tmp_path / "none")) > 2**60
