"""`scripts/release` on a scratch repository, with builds that take no time; and the state of this tree's changelog."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RELEASE = runpy.run_path(str(ROOT / "scripts/release"))
KINDS = ["Added", "Changed", "Fixed", "Known limits"]
CHANGELOG = """\
# Changelog

What changed.

## 0.3.0 - 2030-01-31

### Added

- A thing ([decision 7](docs/decisions/007.md), [paper](https://example.org/paper)).

## 0.2.0 - 2029-01-31

- The first thing.
"""


class Scratch:
    """A repository whose builds write files of the tree's version and note what was called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / ".git" / "calls"
        for name, text in self._files().items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.git("init", "--quiet")
        self.commit("CHANGELOG.md", CHANGELOG)

    def _files(self) -> dict[str, str]:
        called = f'#!/bin/sh\necho "$(basename $0)" $* >>"{self.calls}"\n'
        wheel = "offload_moe-0.3.0-py3-none-any.whl"
        python = f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
        python += (
            f"with open({str(self.calls)!r}, 'a') as calls: print(Path(sys.argv[0]).stem, *sys.argv[1:], file=calls)\n"
        )
        out = "out = Path(sys.argv[sys.argv.index('--out') + 1])\nout.mkdir(exist_ok=True)\n"
        return {
            "pyproject.toml": '[project]\nversion = "0.3.0"\n',
            "offload_moe/__init__.py": '__version__ = "0.3.0"\n',
            "CITATION.cff": "cff-version: 1.2.0\nversion: 0.3.0\n",
            ".gitignore": "dist/\n",
            "scripts/build_wheels": f"{python}{out}(out / {wheel!r}).touch()\n",
            "scripts/check_wheel": called,
            "build.py": f"{python}assert Path(sys.argv[-1], 'pyproject.toml').exists()\n",
        }

    def git(self, *words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", *identity, *words]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", name)

    def called(self) -> list[str]:
        return [line.split()[0] for line in self.calls.read_text().splitlines()] if self.calls.exists() else []


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scratch:
    (folder := tmp_path / "tree").mkdir()
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "x")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "x@example.org")
    (folder / ".git").mkdir()
    made = Scratch(folder)
    monkeypatch.setitem(RELEASE["main"].__globals__, "ROOT", folder)
    return made


def release(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["release", *arguments])
    returned: int = RELEASE["main"]()
    return returned


def test_a_release_is_built_checked_and_tagged(scratch: Scratch, tmp_path: Path) -> None:
    """The script itself, in a process of its own; then once more, which is refused."""
    shutil.copy(ROOT / "scripts/release", scratch.folder / "scripts")
    scratch.commit("more", "")
    command = [sys.executable, "scripts/release", "--out", str(tmp_path / "dist")]
    variables = os.environ | {"PYTHONPATH": str(scratch.folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=scratch.folder, capture_output=True, text=True, env=variables)
    assert (done.returncode, done.stdout) == (
        0,
        "### Added\n\n- A thing (decision 7, [paper](https://example.org/paper)).\n",
    )
    wheels, sdist, trial = scratch.calls.read_text().splitlines()
    assert wheels == f"build_wheels --twice --out {tmp_path / 'dist'}"
    assert sdist.startswith(f"build --sdist --no-isolation --outdir {tmp_path / 'dist'} ")
    assert trial == f"check_wheel {tmp_path / 'dist' / 'offload_moe-0.3.0-py3-none-any.whl'}"
    assert scratch.git("rev-parse", "v0.3.0^{commit}") == scratch.git("rev-parse", "HEAD")
    done = subprocess.run(command, cwd=scratch.folder, capture_output=True, text=True, env=variables)
    assert done.returncode == 1
    assert "error: The tag v0.3.0 exists" in done.stderr
    assert len(scratch.called()) == 3


def test_a_dry_run_makes_no_tag(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(scratch.folder))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert release(monkeypatch, "--dry-run") == 0
    assert scratch.called() == ["build_wheels", "build", "check_wheel"]
    assert scratch.git("tag") == ""
    scratch.git("tag", "v0.3.0")
    assert release(monkeypatch, "--dry-run") == 0  # as on the forge, which builds the commit of the tag
    scratch.commit("later", "")
    assert release(monkeypatch, "--dry-run") == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "pyproject.toml",
            '[project]\nversion = "0.2.0"\n',
            "pyproject.toml has the version 0.2.0, CHANGELOG.md 0.3.0 (2030",
        ),
        ("offload_moe/__init__.py", "", "offload_moe/__init__.py has the version (none), CHANGELOG.md 0.3.0"),
        ("CITATION.cff", "version: 0.3\n", "CITATION.cff has the version 0.3, CHANGELOG.md 0.3.0"),
        ("CHANGELOG.md", "# Changelog\n", "has no section of a version"),
        ("CHANGELOG.md", CHANGELOG.replace("0.3.0 - ", "0.3.0, "), "'## 0.3.0, 2030-01-31' is no heading like"),
        ("CHANGELOG.md", CHANGELOG.replace("0.2.0", "0.10.0"), "does not begin with the newest version"),
        ("CHANGELOG.md", CHANGELOG.replace("2029-01-31", "unreleased"), "0.2.0 is unreleased, below 0.3.0"),
        ("CHANGELOG.md", CHANGELOG.replace("2030-01-31", "unreleased"), "0.3.0 is unreleased. Put the date"),
    ],
)
def test_what_is_not_ready_is_named_and_nothing_is_built(
    name: str,
    text: str,
    message: str,
    scratch: Scratch,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scratch.commit(name, text)
    for arguments in ((), ("--notes",)):
        assert release(monkeypatch, *arguments) == 1
        said = capsys.readouterr()
        assert message in said.err
        assert said.out == ""
    assert scratch.called() == []
    assert scratch.git("tag") == ""


@pytest.mark.parametrize("name", ["CITATION.cff", "not-tracked"])
def test_files_that_are_not_committed_are_refused(
    name: str, scratch: Scratch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (scratch.folder / name).open("a") as file:
        file.write("\n")
    assert release(monkeypatch, "--dry-run") == 1
    assert capsys.readouterr().err.endswith(f" {name}\n")
    assert scratch.called() == []


def test_before_a_release_the_version_is_the_one_before(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run takes a section without a date; its version is that of the section below."""
    scratch.commit(
        "CHANGELOG.md", CHANGELOG.replace("0.3.0 - 2030-01-31", "0.4.0 - unreleased").replace("0.2.0", "0.3.0")
    )
    check: Any = RELEASE["check_tree"]
    assert check(may_be_unreleased=True).version == "0.4.0"
    scratch.commit("CITATION.cff", "version: 0.4.0\n")
    with pytest.raises(RELEASE["ReleaseError"], match=r"CITATION\.cff has the version 0\.4\.0, CHANGELOG\.md 0\.3\.0"):
        check(may_be_unreleased=True)


def test_the_changelog_is_releases_of_entries_of_one_line() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    found = RELEASE["sections"](text)
    assert [section.version for section in found][-2:] == ["0.2.0", "0.1.0"]
    for section in found:
        assert re.findall("^### (.+)", section.text, re.MULTILINE) == KINDS
        entries = [line for line in section.text.splitlines() if line and not line.startswith("### ")]
        assert [line for line in entries if not line.startswith("- ") or len(line) > 300] == []
