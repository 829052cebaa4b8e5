"""The build backend: setuptools', and a C compiler from the package index where the machine has none that works."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # the other hooks are setuptools' own

COMPILER_PACKAGE = "ziglang>=0.17.1,<0.18"
ZIG = [sys.executable, "-m", "ziglang", "cc"]

COMMON_FLAGS = [
    "-std=c11",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# zig compiles for the machine it runs on, adds traps on undefined behaviour, and links functions of its own in place of
# libm's, which have other bits (ZIG_LINK_FLAGS).
ZIG_FLAGS = ["-mcpu=baseline", "-fno-sanitize=undefined"]

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mavx512vnni"]
AVX512_FLAGS += ["-mprefer-vector-width=512"]  # also in loops that the compiler vectorizes
AVX512_VBMI_FLAGS = [*AVX512_FLAGS, "-mavx512vbmi"]
AVX_VNNI_FLAGS = [*AVX2_FLAGS, "-mavxvnni"]  # since gcc 11 and clang 12: the set is left out before
X86_FLAGS = {
    "isa_avx2.c": AVX2_FLAGS,
    "isa_avx512.c": AVX512_FLAGS,
    "isa_avx512_vbmi.c": AVX512_VBMI_FLAGS,
    "panel_avx2.c": AVX2_FLAGS,
    "panel_avx_vnni.c": AVX_VNNI_FLAGS,
    "panel_avx512.c": AVX512_FLAGS,
    "panel_avx512_vbmi.c": AVX512_VBMI_FLAGS,
    "panel_avx512_vl.c": AVX512_FLAGS,
    "vector_avx2.c": AVX2_FLAGS,
    "vector_avx512.c": AVX512_FLAGS,
}
# What is compiled for: Python's variable _PYTHON_HOST_PLATFORM names another system and processor than this machine's.
IS_WINDOWS = sysconfig.get_platform().startswith("win")
TARGET = sysconfig.get_platform().rpartition("-")[2].lower()
ZIG_LINK_FLAGS = ["-s"] if IS_WINDOWS else ["-rtlib=none", "-s"]  # Windows' own C library needs the functions
IS_X86 = (platform.machine().lower() if TARGET == "universal2" else TARGET) in ("x86_64", "amd64")

_PROBE = "#include <math.h>\n#include <pthread.h>\nfloat probe(float x) { return expf(x); }\n"


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *compiler_packages()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *compiler_packages()]


def compiler_packages() -> list[str]:
    """What brings a compiler, where there is none and CC names none."""
    return [] if os.environ.get("CC") or find_compiler() else [COMPILER_PACKAGE]


def choose_compiler() -> list[str]:
    """The command of the compiler that builds the library. Raises: RuntimeError where there is none."""
    if found := find_compiler():
        return found
    if named := os.environ.get("CC"):
        raise RuntimeError(f"CC={named} does not compile a small C program: {_failure(shlex.split(named))}. Unset CC.")
    if find_spec("ziglang") is None:
        raise RuntimeError(
            "No C compiler that works was found, and none was fetched. Install one (Debian: apt install gcc libc6-dev, "
            "macOS: xcode-select --install), or `pip install ziglang`, or leave --no-build-isolation out."
        )
    return ZIG


@cache
def find_compiler() -> list[str] | None:
    """The first that works: CC alone where it is set, else what Python was built with, cc, gcc or clang."""
    named = os.environ.get("CC")
    # Windows: Microsoft's compiler has no POSIX threads, and gcc stores 32 bytes at addresses of 16 (its bug 54412).
    usual = [] if IS_WINDOWS else [sysconfig.get_config_var("CC") or "cc", "cc", "gcc", "clang"]
    commands = [named] if named else usual
    return next((words for command in commands if _failure(words := shlex.split(command)) is None), None)


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether a compiler that works takes these flags too."""
    return _failure(compiler, flags) is None


def is_zig(compiler: list[str]) -> bool:
    return any("zig" in Path(word).name for word in compiler)


def _failure(compiler: list[str], flags: list[str] | None = None) -> str | None:
    """Why a small shared library cannot be built with every flag that ours needs; None where it can.

    A compiler may be there without its headers, as a stub that offers to install it, or too old for the flags.
    """
    if shutil.which(compiler[0]) is None:
        return f"{compiler[0]} is not found"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(_PROBE)
        for_sets = flags or (AVX512_VBMI_FLAGS if IS_X86 else [])
        if is_zig(compiler):  # takes all of them, and builds the C library anew for each choice, which lasts
            for_sets = ZIG_FLAGS
        always = [*compiler, "-std=c11", "-fPIC", "-shared"]
        command = [*always, *for_sets, str(source), "-o", str(Path(folder, "probe.so")), "-lm", "-lpthread"]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
    return lines[0] if run.returncode else None
