"""The one-way flow of docs/how-it-works.md: a room imports only from rooms before it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each room, with the rooms it may import. The ones in COMMON are everybody's.
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
    "doctor",
]
COMMON = {
    "budget",
    "cores",
    "errors",
    "hooks",
    "lifecycle",
    "locks",
    "names",
    "native",
    "open_files",
    "paths",
    "saving",
    "sizes",
    "texts",
    "token_ids",
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def files_of(room: str) -> list[Path]:
    folder = ROOT / "offload_moe" / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("room", FLOW)
def test_a_room_imports_only_earlier_rooms(room: str) -> None:
    allowed = {*FLOW[: FLOW.index(room) + 1], *COMMON}
    for path in files_of(room):
        for name in imports_of(path):
            if name.startswith("offload_moe."):
                assert name.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_every_room_is_in_the_flow() -> None:
    entries = {path.stem for path in (ROOT / "offload_moe").iterdir() if not path.name.startswith(("_", "py."))}
    assert entries - COMMON <= set(FLOW)


@pytest.mark.parametrize(
    "path", ["residency/keys.py", "residency/residency.py", "residency/counters.py", "residency/policy"]
)
def test_decisions_import_no_torch(path: str) -> None:
    target = ROOT / "offload_moe" / path
    for file in sorted(target.rglob("*.py")) if target.is_dir() else [target]:
        assert not any(name.split(".")[0] == "torch" for name in imports_of(file)), file


def test_streams_and_events_live_in_one_file() -> None:
    for file in (ROOT / "offload_moe").rglob("*.py"):
        if file.name != "copier.py":
            assert not any(word in file.read_text() for word in ("torch.Stream", "torch.Event", "torch.cuda.")), file


def test_the_command_line_is_the_last_room() -> None:
    for file in (ROOT / "offload_moe").rglob("*.py"):
        assert not any(name.startswith("offload_moe_cli") for name in imports_of(file)), file


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
