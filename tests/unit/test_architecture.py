"""The one-way flow of docs/how-it-works.md: a room imports only from rooms before it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOW = [
    "system",
    "quant",
    "native",
    "families",
    "checkpoint",
    "demo",
    "store",
    "memory",
    "residency",
    "experts",
    "decode",
    "speculate",
    "card",
    "convert",
    "profile",
    "simulate",
    "plan",
    "chat",
    "engine",
    "serve",
    "cluster",
    "doctor",
]
COMMON = {"errors"}  # files that every room may import
# It makes the tiers, whose slots are tensors; a decision takes what it decides about as numbers.
NEEDS_TORCH = {"hierarchy.py"}


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / "offload_moe" / room).rglob("*.py"))


@pytest.mark.parametrize("room", FLOW)
def test_a_room_imports_only_earlier_rooms(room: str) -> None:
    allowed = {*FLOW[: FLOW.index(room) + 1], *COMMON}
    for path in files_of(room):
        for name in files_imported(name_of(path), path):
            if name.startswith("offload_moe."):
                assert name.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_a_room_taken_from_the_package_itself_counts() -> None:
    source = ast.parse("from offload_moe import __version__, errors, serve")
    found = modules_imported(("offload_moe", "card", "pool"), source)
    assert found == {"offload_moe", "offload_moe.errors", "offload_moe.serve"}


def test_every_room_is_in_the_flow() -> None:
    entries = {path.stem for path in (ROOT / "offload_moe").iterdir() if not path.name.startswith(("_", "py."))}
    assert entries == {*FLOW, *COMMON}


def test_decisions_import_no_torch() -> None:
    importing = {path.name for path in files_of("residency") if "torch" in packages_imported(path)}
    assert importing == NEEDS_TORCH


def test_streams_and_events_live_in_one_file() -> None:
    for file in (ROOT / "offload_moe").rglob("*.py"):
        if file.name != "copier.py":
            assert not any(word in file.read_text() for word in ("torch.Stream", "torch.Event", "torch.cuda.")), file


def test_checksums_are_computed_in_one_file() -> None:
    for file in (ROOT / "offload_moe").rglob("*.py"):
        assert ("zlib.crc32" in file.read_text()) is (file.name == "checksum.py"), file


def test_the_command_line_is_the_last_room() -> None:
    for file in (ROOT / "offload_moe").rglob("*.py"):
        assert "offload_moe_cli" not in packages_imported(file), file


def test_no_statement_stands_behind_a_way_out() -> None:
    """Where a condition is lost, what it guarded follows a `raise` of its own depth; `mypy` does not say so."""
    behind = re.compile(r"^( +)(?:raise|return|continue|break)\b.*[^(\[{,\n]\n\1[^\s)\]}#]", re.MULTILINE)
    assert behind.search("if x:\n    raise A\n    raise B\n")
    for root in ("offload_moe", "cli"):
        for file in (ROOT / root).rglob("*.py"):
            assert not behind.search(file.read_text()), file


@pytest.mark.parametrize("root", ["offload_moe", "cli"])
def test_no_two_files_import_each_other(root: str) -> None:
    """Directly or through others, inside a room too, and not for types only either."""
    paths = {name_of(path): path for path in (ROOT / root).rglob("*.py")}
    waiting = {name: files_imported(name, path) & set(paths) - {name} for name, path in paths.items()}
    assert sum(map(len, waiting.values())) > len(paths)
    assert not in_circles(waiting)


def test_circles_are_found() -> None:
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}
    assert not in_circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("if TYPE_CHECKING:\n    from offload_moe.residency.lease import Lease", "offload_moe.residency.lease"),
        ("def f() -> None:\n    from offload_moe.residency import lease", "offload_moe.residency.lease"),
        ("from .lease import Lease", "offload_moe.residency.lease"),
        ("from ..native import kernels", "offload_moe.native.kernels"),
        ("from . import lease", "offload_moe.residency.lease"),
        ("import offload_moe.residency.lease", "offload_moe.residency.lease"),
        ("from offload_moe.store import Store", "offload_moe.store"),
    ],
)
def test_every_kind_of_import_counts(source: str, expected: str) -> None:
    assert modules_imported(("offload_moe", "residency", "tier"), ast.parse(source)) == {expected}


def in_circles(waiting: dict[str, set[str]]) -> set[str]:
    """Files that import each other, and files that import those."""
    left = dict(waiting)
    while free := [name for name, needed in left.items() if not needed & set(left)]:
        for name in free:
            del left[name]
    return set(left)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files_imported(name: str, path: Path) -> set[str]:
    parts = tuple(name.split("."))
    return modules_imported((*parts, "__init__") if path.name == "__init__.py" else parts, ast.parse(path.read_text()))


def packages_imported(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in files_imported(name_of(path), path)}


def modules_imported(name: tuple[str, ...], tree: ast.Module) -> set[str]:
    """A package counts only where something that is no module is taken from it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name[: len(name) - node.level] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            targets = (f"{module}.{alias.name}" for alias in node.names)
            found |= {target if is_module(target) else module for target in targets}
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
