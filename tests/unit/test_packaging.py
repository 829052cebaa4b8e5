"""What the wheel holds is what the tree holds."""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from setuptools import Distribution

from offload_moe.native import library

ROOT = Path(__file__).parents[2]
BUILD_WHEELS = runpy.run_path(str(ROOT / "scripts/build_wheels"))
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_in_the_wheel() -> None:
    found = {
        ".".join((name, *init.parent.relative_to(ROOT / folder).parts))
        for folder, name in (("offload_moe", "offload_moe"), ("cli", "offload_moe_cli"))
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == found


def test_every_data_file_is_in_the_wheel() -> None:
    for path in (ROOT / "offload_moe").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so", ".dll") and path.parent.name != "csrc":
            folder = next(folder for folder in path.parents if (folder / "__init__.py").exists())
            patterns = SETUPTOOLS["package-data"].get(".".join(folder.relative_to(ROOT).parts), [])
            assert any(path.match(pattern) for pattern in patterns), f"{path.relative_to(ROOT)} is left out"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.delenv("CC", raising=False)
    spec = spec_from_file_location("build_backend", ROOT / "build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_wheel", lambda _: ["wheel"])
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_editable", lambda _: ["editables"])
    yield module
    module.find_compiler.cache_clear()


def executable(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def only_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("sysconfig.get_config_var", {"CC": "nonesuch-cc -pthread"}.get)


def test_without_a_compiler_the_build_fetches_one(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only_on_path(monkeypatch, tmp_path)
    assert backend.get_requires_for_build_wheel() == ["wheel", backend.COMPILER_PACKAGE]
    assert backend.get_requires_for_build_editable() == ["editables", backend.COMPILER_PACKAGE]
    assert backend.COMPILER_PACKAGE.startswith("ziglang")


@pytest.mark.parametrize("name", ["cc", "gcc", "clang"])
def test_with_a_compiler_that_works_it_fetches_none(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    only_on_path(monkeypatch, tmp_path)
    executable(tmp_path, name, "exit 0")
    assert backend.get_requires_for_build_wheel() == ["wheel"]
    assert backend.choose_compiler() == [name]


def test_a_compiler_that_compiles_nothing_counts_for_none(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No headers, too old for a flag, or a stub that offers to install one."""
    only_on_path(monkeypatch, tmp_path)
    executable(tmp_path, "cc", "echo 'fatal error: pthread.h: No such file or directory' >&2; exit 1")
    assert backend.get_requires_for_build_editable() == ["editables", backend.COMPILER_PACKAGE]
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"No C compiler that works.*pip install ziglang.*--no-build-isolation"):
        backend.choose_compiler()
    monkeypatch.setattr(backend, "find_spec", lambda _: "there")
    assert backend.choose_compiler() == backend.ZIG
    assert backend.is_zig(backend.ZIG)


def test_cc_names_the_compiler_and_no_other_is_used(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only_on_path(monkeypatch, tmp_path)
    executable(tmp_path, "gcc", "exit 0")
    named = executable(tmp_path, "mycc", "[ \"$1\" = --fast ] || { echo 'unknown flag' >&2; exit 1; }")
    monkeypatch.setenv("CC", f"{named} --fast")
    assert backend.choose_compiler() == [str(named), "--fast"]
    assert backend.get_requires_for_build_wheel() == ["wheel"]
    backend.find_compiler.cache_clear()
    monkeypatch.setenv("CC", str(named))
    assert backend.get_requires_for_build_wheel() == ["wheel"]
    with pytest.raises(RuntimeError, match=r"CC=.*mycc does not compile a small C program: unknown flag"):
        backend.choose_compiler()


@pytest.mark.parametrize(
    ("platform", "is_x86"),
    [
        *[
            ("linux-x86_64", True),
            ("linux-aarch64", False),
            ("macosx-11.0-arm64", False),
            ("macosx-10.15-x86_64", True),
        ],
        ("win-amd64", True),
    ],
)
def test_flags_follow_the_target_not_this_machine(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, platform: str, is_x86: bool
) -> None:
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", platform)
    chosen = runpy.run_path(str(ROOT / "build_backend.py"))
    assert chosen["IS_X86"] is is_x86
    assert chosen["IS_WINDOWS"] is (platform == "win-amd64")


def test_on_windows_only_zig_compiles(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Microsoft's compiler has no POSIX threads, and gcc's code for AVX crashes there."""
    only_on_path(monkeypatch, tmp_path)
    executable(tmp_path, "gcc", "exit 0")
    monkeypatch.setattr(backend, "IS_WINDOWS", True)
    assert backend.get_requires_for_build_wheel() == ["wheel", backend.COMPILER_PACKAGE]


def set_up(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Distribution]:
    """What setup.py gives setuptools, and a distribution of its extension modules."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    monkeypatch.setattr("sys.path", list(sys.path))
    runpy.run_path(str(ROOT / "setup.py"))
    distribution = Distribution({"name": "offload-moe", "version": "1", "ext_modules": given["ext_modules"]})
    return given, distribution


def test_a_wheel_is_for_every_python_of_its_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is loaded by ctypes. What a wheel holds is checked by `scripts/build_wheels`."""
    given, distribution = set_up(monkeypatch)
    wheel = given["cmdclass"]["bdist_wheel"](distribution)
    wheel.ensure_finalized()
    python, abi, platform = wheel.get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    built = given["cmdclass"]["build_ext"](distribution).get_ext_filename("offload_moe.native._native")
    assert Path(built) == Path("offload_moe/native/_native.so")
    assert Path(library.load_library()._name) == ROOT / built


def test_zig_compiles_for_every_processor(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And not for the one that it runs on, which is its default; files of an instruction set have their own flags."""
    given, distribution = set_up(monkeypatch)
    build = given["cmdclass"]["build_ext"](distribution)
    build.ensure_finalized()
    build.build_lib, build.build_temp, build.command = str(tmp_path), str(tmp_path), backend.ZIG
    build.compiler = Mock()
    build.compiler.compile.side_effect = lambda sources, **_: sources
    (extension,) = given["ext_modules"]
    build.build_extension(extension)
    flags = [call.kwargs["extra_postargs"] for call in build.compiler.compile.call_args_list]
    assert len(flags) == len(extension.sources) > 10
    assert all("-mcpu=baseline" in each for each in flags)
    assert any("-mavx2" in each for each in flags) is backend.IS_X86
    assert "-mcpu=baseline" in build.compiler.set_executables.call_args.kwargs["linker_so"]


def test_the_compiler_that_is_fetched_is_one_that_builds_the_wheels() -> None:
    """Earlier ones cannot compile all files."""
    backend = runpy.run_path(str(ROOT / "build_backend.py"))
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["wheels"]
    (version,) = (Requirement(each).specifier for each in pinned if each.startswith("ziglang"))
    fetched = Requirement(backend["COMPILER_PACKAGE"]).specifier
    assert str(version).removeprefix("==") in fetched
    assert not any(earlier in fetched for earlier in ("0.14.0", "0.15.1", "0.16.0"))


def test_wheels_are_checked_for_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("sys.path", list(sys.path))
    flags = runpy.run_path(str(ROOT / "setup.py"))["X86_FLAGS"]
    assert {Path(name).stem for name in flags} == set(BUILD_WHEELS["X86_INSTRUCTIONS"])
    assert all((ROOT / BUILD_WHEELS["CSRC"] / f"{name}.c").exists() for name in BUILD_WHEELS["NEON_INSTRUCTIONS"])


@pytest.mark.parametrize(
    ("added", "left_out", "wrong"),
    [
        ([], [], ""),
        (["tests/unit/test_x.py"], [], "tests/unit/test_x.py"),
        (["offload_moe/native/csrc/abi.c"], [], "offload_moe/native/csrc/abi.c"),
        ([], ["offload_moe/demo/split.safetensors"], "offload_moe/demo/split.safetensors"),
        ([], ["offload_moe-1.dist-info/licenses/LICENSE"], "licenses/LICENSE"),
        ([], ["offload_moe/native/_native.so"], "_native.so"),
    ],
)
def test_a_wheel_has_the_package_and_nothing_else(
    added: list[str], left_out: list[str], wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = ["offload_moe/__init__.py", "offload_moe/demo/split.safetensors", "cli/main.py", "setup.py"]
    check = BUILD_WHEELS["check_contents"]
    monkeypatch.setitem(check.__globals__, "tracked", lambda: [*tracked, "offload_moe/native/csrc/abi.c"])
    names = {*tracked[:2], "offload_moe_cli/main.py", "offload_moe/native/_native.so", *added}
    names |= {f"offload_moe-1.dist-info/{name}" for name in BUILD_WHEELS["METADATA"]}
    with ZipFile(tmp_path / "a.whl", "w") as archive:
        for name in names - set(left_out):
            archive.writestr(name, "")
    expected = pytest.raises(BUILD_WHEELS["WheelError"], match=f"{re.escape(wrong)}$") if wrong else nullcontext()
    with expected:
        check(tmp_path / "a.whl")


@pytest.fixture
def build_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script, in a committed tree of one file, with a build that takes no time. The folder that it builds into."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.py").write_text("a = 1\n")
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message", "x"]):
        subprocess.run(["git", *words], cwd=tree, check=True)
    inside = BUILD_WHEELS["main"].__globals__
    for name in ("check_contents", "check_instructions", "check_glibc"):
        monkeypatch.setitem(inside, name, lambda *_: None)
    monkeypatch.setitem(inside, "ROOT", tree)
    monkeypatch.setitem(inside, "tracked", lambda: ["a.py"])
    monkeypatch.setattr("sys.argv", ["build_wheels", "linux-x86_64", "macos-arm64", "--out", str(tmp_path / "dist")])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    really_run = subprocess.run

    def run(command: list[str], **options: Any) -> "subprocess.CompletedProcess[Any]":
        if "build" not in command:
            return really_run(command, **options)
        (out := Path(command[command.index("--outdir") + 1])).mkdir(exist_ok=True)
        tag = command[-2].partition("--plat-name=")[2]
        (out / f"offload_moe-2-py3-none-{tag}.whl").write_bytes(Path(command[-1], "a.py").read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return tmp_path / "dist"


def test_a_wheel_of_another_version_stays_beside_the_new_one(build_wheels: Path) -> None:
    build_wheels.mkdir()
    older = build_wheels / "offload_moe-1-py3-none-macosx_11_0_arm64.whl"
    older.write_bytes(b"older")
    assert BUILD_WHEELS["main"]() == 0
    assert {path.name: path.read_bytes() for path in build_wheels.iterdir()} == {
        older.name: b"older",
        "offload_moe-2-py3-none-macosx_11_0_arm64.whl": b"a = 1\n",
        "offload_moe-2-py3-none-manylinux_2_28_x86_64.whl": b"a = 1\n",
    }


def test_wheels_are_built_from_commits(build_wheels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = build_wheels.parent / "tree"
    (tree / "not-tracked.txt").touch()
    assert BUILD_WHEELS["main"]() == 0
    (tree / "a.py").write_text("a = 2\n")
    capsys.readouterr()
    assert BUILD_WHEELS["main"]() == 1
    assert capsys.readouterr().err.endswith("wheels are built from commits:\n M a.py\n")


@pytest.mark.parametrize(
    ("found", "said"), [("/bin/llvm-objdump", "checked"), (None, "not disassembled, as llvm-objdump is not installed")]
)
def test_what_was_not_disassembled_is_not_called_checked(
    found: str | None,
    said: str,
    build_wheels: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: found)
    assert BUILD_WHEELS["main"]() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" MB, ")[2] for line in lines] == [said, said]


def test_c_sources_are_in_the_source_archive_only() -> None:
    assert SETUPTOOLS["include-package-data"] is False
    assert any("csrc *.c *.h" in line for line in (ROOT / "MANIFEST.in").read_text().splitlines())


def test_the_build_backend_is_in_the_source_archive() -> None:
    assert "include build_backend.py" in (ROOT / "MANIFEST.in").read_text().splitlines()
