"""NVRTC is found, programs are compiled once and kept, and what keeps them from it is said."""

import os
import stat
from pathlib import Path

import pytest
from support.cuda import fake, shim

from offload_moe.card import cubins
from offload_moe.card.cubins import Compiler
from offload_moe.card.nvrtc import Nvrtc, candidates, load_nvrtc
from offload_moe.errors import DevicePassUnavailable

PROGRAM = """#include "value.cuh"
struct params { int *to; };
extern "C" __global__ void om_x(const params p) { *p.to = VALUE; }"""
DRIVER = 13000


@pytest.fixture
def nvrtc() -> Nvrtc:
    if not shim.has_compiler():
        pytest.skip("no C++ compiler")
    return load_nvrtc(architecture=86, driver_version=DRIVER, path=fake.nvrtc("plain"))


@pytest.fixture
def compiler(nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "value.cuh").write_text("#define VALUE 7\n")
    monkeypatch.setattr(cubins, "KERNELS", kernels)
    quick = tmp_path / "quick"  # in place of a compiler: a checksum of the program
    quick.write_text("#!/bin/sh\ncksum\n")
    quick.chmod(0o755)
    monkeypatch.setenv("OFFLOAD_MOE_SHIM", str(quick))
    return Compiler(nvrtc, 86, tmp_path / "cubins")


def stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_SHIM", "false")


def folder_of(compiler: Compiler) -> Path:
    assert compiler.folder is not None
    return compiler.folder


def test_a_program_is_compiled_once(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.image(PROGRAM)
    assert first.startswith(b"OMFAKE:")
    stop(monkeypatch)
    assert compiler.image(PROGRAM) == first
    assert Compiler(compiler.nvrtc, 86, compiler.folder).images([PROGRAM, PROGRAM]) == [first, first]
    assert [file.suffix for file in folder_of(compiler).iterdir()] == [".cubin"]


@pytest.mark.parametrize("change", ["program", "header", "architecture", "version"])
def test_whatever_a_cubin_depends_on_makes_another(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    compiler.image(PROGRAM)
    stop(monkeypatch)
    program = PROGRAM
    if change == "program":
        program += "\n"
    elif change == "header":
        (cubins.KERNELS / "value.cuh").write_text("#define VALUE 8\n")
    elif change == "architecture":
        compiler = Compiler(compiler.nvrtc, 89, compiler.folder)
    else:
        other = Nvrtc(compiler.nvrtc.library, (13, 1), compiler.nvrtc.architectures)
        compiler = Compiler(other, 86, compiler.folder)
    with pytest.raises(DevicePassUnavailable, match="does not compile"):
        compiler.image(program)


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_cubin_is_compiled_again(compiler: Compiler, damage: bytes | None) -> None:
    image = compiler.image(PROGRAM)
    (path,) = folder_of(compiler).iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?" if damage is None else damage)
    assert compiler.image(PROGRAM) == image
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_does_not_matter(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = Compiler(compiler.nvrtc, 86, tmp_path / "file" / "cubins")
    assert blocked.image(PROGRAM).startswith(b"OMFAKE:")


def test_a_cache_that_is_only_readable_serves(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    image = compiler.image(PROGRAM)
    folder = folder_of(compiler)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert compiler.image(PROGRAM + " ").startswith(b"OMFAKE:")
        stop(monkeypatch)
        assert compiler.image(PROGRAM) == image
    finally:
        folder.chmod(stat.S_IRWXU)


def test_only_the_newest_are_kept(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "MOST_KEPT", 2)
    folder = folder_of(compiler)
    folder.mkdir()
    for age in range(3):
        old = folder / f"{age}.cubin"
        old.write_bytes(b"old")
        os.utime(old, (1000 - age, 1000 - age))
    compiler.image(PROGRAM)
    assert sorted(file.name for file in folder.iterdir() if file.name[1] == ".") == ["0.cubin"]


def test_the_first_error_of_the_compiler_is_the_reason(compiler: Compiler) -> None:
    fake.nvrtc("plain")
    with pytest.raises(DevicePassUnavailable, match=r"NVRTC 13\.0 does not compile the kernels: .*error: .*nonesuch"):
        compiler.image('extern "C" __global__ void om_x(const int p) { nonesuch(); }')


@pytest.mark.parametrize(
    ("architecture", "driver_version", "reason"),
    [
        (61, DRIVER, "the kernels need sm_75 or newer, and this card is sm_61"),
        (130, DRIVER, r"NVRTC 13\.0 does not compile for this card, which is sm_130: its newest is sm_120"),
        (86, 12040, r"NVRTC 13\.0 needs a driver for CUDA 13, and this one has CUDA 12\.4"),
    ],
)
def test_an_nvrtc_that_does_not_serve_says_why(
    nvrtc: Nvrtc, architecture: int, driver_version: int, reason: str
) -> None:
    with pytest.raises(DevicePassUnavailable, match=reason):
        load_nvrtc(architecture=architecture, driver_version=driver_version, path=fake.nvrtc("plain"))


@pytest.mark.parametrize("content", [None, b"no library"])
def test_without_nvrtc_the_reason_says_how_to_get_it(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "libnvrtc.so.13"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DevicePassUnavailable, match=r"^NVRTC is not found \(`pip install nvidia-cuda-nvrtc` brings"):
        load_nvrtc(architecture=86, driver_version=DRIVER, path=str(path))


@pytest.mark.parametrize(
    "place",
    [
        "nvidia/cu13/lib/libnvrtc.so.13",
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        "nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll",
        "torch/lib/nvrtc64_120_0.dll",
    ],
)
def test_it_is_found_beside_torch_first(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.touch()
    path.with_name("nvrtc64_130_0.alt.dll").touch()
    path.with_name("libnvrtc-builtins.so.13.0").touch()
    assert next(candidates({}, [str(tmp_path)])) == str(path)


def test_a_toolkit_is_looked_at_last(tmp_path: Path) -> None:
    path = tmp_path / "lib64" / "libnvrtc.so.13.0.88"
    path.parent.mkdir()
    path.touch()
    found = list(candidates({"CUDA_HOME": str(tmp_path)}, []))
    assert found[:2] == ["libnvrtc.so.13", "libnvrtc.so.12"]
    assert found[2] == str(path)
