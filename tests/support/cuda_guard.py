"""FakeTensorMode on `cuda` with a CPU build of torch: a device guard that guards nothing, compiled on the spot."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

SOURCE = """
#include <c10/core/impl/FakeGuardImpl.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>) }
"""


@cache
def cuda_guard_missing() -> str | None:
    """Register the guard once per process. Returns why that cannot be done, or None."""
    if torch.backends.cuda.is_built():
        return None
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler to build a CUDA device guard with"
    root = Path(torch.__file__).parent
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(SOURCE)
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        done = subprocess.run([compiler, str(source), *flags, "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            return f"the CUDA device guard does not compile: {done.stderr.strip().splitlines()[0]}"
        ctypes.CDLL(str(library))
    return None
