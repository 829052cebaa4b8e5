"""Extensions on the import path, as pip leaves them: a module and its metadata."""

import shutil
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from offload_moe.system import extensions

EXAMPLE = Path(__file__).parents[2] / "examples" / "extension"

Entries = Mapping[str, Mapping[str, str]]  # group -> name -> object


class Site:
    """A folder of the import path. Modules from it are forgotten after the test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        folder.mkdir()
        monkeypatch.syspath_prepend(folder)
        extensions.installed.cache_clear()

    def write(self, distribution: str, entries: Entries | str, **modules: str) -> None:
        """Install a distribution of version 1.0. entries: or the text of `entry_points.txt`. modules: their texts."""
        info = self.folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entries if isinstance(entries, str) else entry_points(entries))
        for name, text in modules.items():
            (self.folder / f"{name}.py").write_text(text)
            self._monkeypatch.delitem(sys.modules, name, raising=False)
        extensions.installed.cache_clear()

    def remove(self) -> None:
        """Uninstall everything. Modules that were imported stay."""
        shutil.rmtree(self.folder)
        extensions.installed.cache_clear()


def entry_points(entries: Entries) -> str:
    return "\n".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in named.items())
        for group, named in entries.items()
    )


def write_example(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install `examples/extension`, whose modules stay where they are."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site.write(project["name"], project["entry-points"])
    monkeypatch.syspath_prepend(EXAMPLE)
