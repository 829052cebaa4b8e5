"""What `scripts/` name is there: the scripts themselves take minutes, and `.ci/run` runs their short forms."""

import ast
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support.cli import load_cli
from tests.support.cuda import shim

ROOT = Path(__file__).parents[2]


def listed(*arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "scripts/delete_waits"), "--list", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_wait_that_is_to_be_deleted_is_found() -> None:
    """A name in the script's tables that no file has any more is an error."""
    deletions = listed()
    assert len(deletions) >= 15
    assert all(re.fullmatch(r"\S+\.py:\d+  .+  ->  .+", line) for line in deletions)


def test_the_fast_form_is_a_sample_of_several_files() -> None:
    fast, files = listed("--fast"), {line.split(":")[0] for line in listed("--fast")}
    assert set(fast) < set(listed())
    assert len(fast) >= len(files) >= 3


@pytest.mark.parametrize("script", ["sanitize", "test_dependencies"])
def test_the_tests_that_are_named_exist(script: str) -> None:
    named = re.findall(r"tests/\S+?\.py", (ROOT / "scripts" / script).read_text())
    assert len(named) >= 4
    assert all(list(ROOT.glob(pattern)) for pattern in named)


def test_two_checkouts_are_compared_trial_by_trial(tmp_path: Path) -> None:
    """`benchmarks/paired.py`, on checkouts whose script takes ever longer, and the new one half as long again."""
    for side, factor in (("old", 1.0), ("new", 1.5)):
        folder = tmp_path / side
        (folder / "benchmarks").mkdir(parents=True)
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/bin/python").symlink_to(sys.executable)
        (folder / "benchmarks/made.py").write_text(
            "import json, pathlib, sys\n"
            "count = pathlib.Path(__file__).with_suffix('.count')\n"
            "number = len(count.read_text()) if count.exists() else 0\n"
            "count.write_text('x' * (number + 1))\n"
            f"value = {factor} * (number + 2)\n"
            "print(json.dumps({'runs': [{'cpu_ms': value}], 'other': 1, 'argument': sys.argv[1]}))\n"
        )
    command = [sys.executable, str(ROOT / "benchmarks/paired.py"), str(tmp_path / "old"), str(tmp_path / "new")]
    command += ["--trials", "7", "--", "made.py", "--tokens"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["new_over_old"].keys() == {"runs.0.cpu_ms"}
    ratio = document["new_over_old"]["runs.0.cpu_ms"]
    assert ratio["median"] == 1.5
    assert ratio["interval"] == [1.5, 1.5]
    assert ratio["old"] == {"median": 5.0, "min": 2.0, "max": 8.0}
    assert document["script"] == ["made.py", "--tokens"]


def test_every_addition_that_is_to_be_reordered_is_found() -> None:
    command = [sys.executable, str(ROOT / "scripts/reorder_additions"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 8


def test_every_change_of_a_kernel_has_its_text() -> None:
    command = [sys.executable, str(ROOT / "scripts/card_mutations"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\w+\.cuh:\d+: ", done.stdout, re.MULTILINE)) >= 200


@pytest.mark.slow
@pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")
def test_a_change_that_only_reads_what_is_not_the_kernels_is_noticed() -> None:
    script = runpy.run_path(str(ROOT / "scripts/card_mutations"))
    (change,) = [change for change in script["changes"]() if "first + h / S < G -> h < HEADS" in change[0]]
    assert script["does_sanitizer_stop"](*change[1:])
    assert not script["does_sanitizer_stop"]("delta.cuh", (script["SOURCES"] / "delta.cuh").read_text())


FORGE = sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"])


@pytest.mark.parametrize("path", FORGE, ids=lambda path: path.name)
def test_files_of_the_forge_name_what_exists(path: Path) -> None:
    text = path.read_text()
    assert yaml.safe_load(text)
    for name in re.findall(r"(?<![\w/])(?:scripts|tests|docs|\.ci)/[\w./*]*\w", text):
        assert list(ROOT.glob(name)), name
    for command in re.findall(r"offload-moe ((?:doctor|plan|run)[^`]*)`", text):
        load_cli().build_parser().parse_args(command.split())


@pytest.mark.parametrize(("user", "by"), [(0, ""), (1000, "sudo -n ")])
def test_ci_installs_the_emulator_as_root_and_shows_what_fails(user: int, by: str, tmp_path: Path) -> None:
    fakes = {
        "id": f"echo {user}",
        "sudo": 'printf "sudo -n " >&2; [ "$1" = -n ] && exec "${@:2}"',
        "apt-get": 'echo "apt-get $1" >&2; [ "$1" = update ] || { echo no such package >&2; exit 100; }',
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    function = re.search(r"^install_emulators\(\).*?^}", (ROOT / ".ci/run").read_text(), re.DOTALL | re.MULTILINE)
    assert function is not None
    command = ["/bin/bash", "-euo", "pipefail", "-c", f"{function[0]}\ninstall_emulators"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    *lines, last = done.stderr.splitlines()
    assert lines == [f"{by}apt-get update", f"{by}apt-get install", "no such package"]
    assert last.startswith("apt-get cannot install gcc-aarch64-linux-gnu")


def test_what_is_slow_and_for_windows_or_for_users_machines_runs_for_each_change() -> None:
    assert "tests/fault/test_users_*.py tests/unit/test_windows.py -m slow" in (ROOT / ".ci/run").read_text()
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["machines"]
    assert any("sudo" in (run := step.get("run", "")) and "tests/fault/test_users_*.py" in run for step in job["steps"])


def test_cells_that_mount_run_as_root_every_night() -> None:
    tree = ast.parse((ROOT / "tests/fault/test_users_machines.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    mounting = {node.name for node in functions if "needs_mounts" in map(ast.unparse, node.decorator_list)}
    chosen = re.search(
        r'sudo .*test_users_machines\.py -m slow -k "(.+)"', (ROOT / ".github/workflows/nightly.yml").read_text()
    )
    assert chosen is not None
    words = chosen[1].split(" or ")
    assert {node.name for node in functions if any(word in node.name for word in words)} == mounting != set()


def test_a_wheel_of_each_systems_compiler_is_tried_by_every_shell() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert "'" not in settings["test-command"], "cmd.exe takes single quotes for letters"
    job = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())["jobs"]["native"]
    assert "windows-latest" in job["strategy"]["matrix"]["os"]
    assert any("cibuildwheel" in step.get("run", "") for step in job["steps"])


def test_every_wheel_is_run_where_it_is_for() -> None:
    tags = re.findall(r'tag="(\w+)"', (ROOT / "scripts/build_wheels").read_text())
    jobs = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())["jobs"]
    text = yaml.safe_dump(jobs)
    assert len(tags) == 4
    assert [tag for tag in tags if tag not in text] == ["manylinux_2_28_x86_64"], "which scripts/release runs"
    assert jobs["windows"]["runs-on"] == "windows-latest"


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f'__version__ = "{version}"' in (ROOT / "offload_moe/__init__.py").read_text()


def test_pythons_are_the_same_everywhere() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = [found[1] for line in classifiers if (found := re.fullmatch(r".*Python :: (3\.\d+)", line))]
    tests = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["tests"]
    assert tests["strategy"]["matrix"]["python"] == named


def test_coverage_says_which_lines_and_ways_no_test_takes(tmp_path: Path) -> None:
    """`scripts/coverage`, over what it reads from reports of coverage.py and gcovr."""
    (tmp_path / "room").mkdir()
    (tmp_path / "room/a.py").write_text("if x:\n    y()\nz()\n")
    (tmp_path / "room/b.c").write_text("if (x)\n  y();\n")
    script = runpy.run_path(str(ROOT / "scripts/coverage"))
    script["left_out"].__globals__["ROOT"] = tmp_path
    found = {
        "room/a.py": {"lines": {"1": True, "2": False, "3": True}, "branches": {"1, 2": False, "1, 3": True}},
        "room/b.c": {"lines": {"1": True, "2": True}, "branches": {"1, way 1 of 2": True, "1, way 2 of 2": False}},
        "roomy/c.py": {"lines": {"1": False}, "branches": {}},
    }
    assert list(script["left_out"](found, "room")) == [
        "room/a.py:1: if x:    [never: 2]",
        "room/a.py:2: y()",
        "room/b.c:1: if (x)    [never: way 2 of 2]",
    ]
    rows = [line.split() for line in script["table"](found).splitlines()]
    assert rows[1:] == [
        ["room", "5", "80.0", "%", "4", "50.0", "%"],
        ["roomy", "1", "0.0", "%", "0"],
        ["all", "of", "Python", "4", "50.0", "%", "2", "50.0", "%"],
        ["all", "of", "C", "2", "100.0", "%", "2", "50.0", "%"],
    ]
