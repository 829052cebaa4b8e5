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
    "convert",
    "profile",
    "simulate",
    "plan",
    "chat",
    "engine",
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


@pytest.mark.parametrize("path", ["residency/residency.py", "residency/counters.py", "residency/policy"])
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


def test_no_two_files_of_the_command_line_import_each_other() -> None:
    """Directly or through others, and not for types only either."""
    files = {path.relative_to(ROOT / "cli").with_suffix("").parts: path for path in (ROOT / "cli").rglob("*.py")}
    waiting = {name: relative_imports(name, path) & set(files) - {name} for name, path in files.items()}
    assert sum(map(len, waiting.values())) > len(files)
    while free := [name for name, needed in waiting.items() if not needed & set(waiting)]:
        for name in free:
            del waiting[name]
    assert not waiting


def relative_imports(name: tuple[str, ...], path: Path) -> set[tuple[str, ...]]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*name[: len(name) - node.level], *(node.module.split(".") if node.module else ()))
            found |= {base, *((*base, alias.name) for alias in node.names)}
    return found
