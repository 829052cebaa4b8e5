"""The fake driver and the fake NVRTC for tests: built once, set up anew for each test."""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from support.cuda import shim

CSRC = shim.ROOT / "offload_moe" / "native" / "csrc"
FLAGS = ["-std=c++17", "-O2", "-g", "-shared", "-fPIC", "-fvisibility=hidden", "-w", "-D_Static_assert=static_assert"]
READS, WRITES, POLLS = 0, 1, 2  # of `omHostAccess`


class FakeDriver:
    """The fake driver, as if newly started. Leaving it fails on problems that no one took."""

    def __init__(self, **options: int) -> None:
        self.path = str(library("fake_cuda.cpp"))
        self.library = ctypes.CDLL(self.path)
        self.library.omFakeProblem.restype = ctypes.c_char_p
        self.library.omFakeCount.restype = ctypes.c_int64
        self.library.omFakeReset()
        self._num_taken = 0
        self.set(**options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            assert not (problems := self.problems()), "\n".join(problems)

    def set(self, **options: int) -> None:
        """Options of `fake_state.h`."""
        for name, value in options.items():
            assert self.library.omFakeSet(name.encode(), ctypes.c_int64(value)) == 0, f"there is no option {name}"

    def declare_hosts(self, at: int, num_bytes: int) -> None:
        """Memory that the card reaches only where it is page-locked, in spite of `adopts`."""
        self.library.omFakeDeclareHosts(ctypes.c_void_p(at), ctypes.c_int64(num_bytes))

    def fail(self, call: str, code: int, *, after: int = 0) -> None:
        """Let a call of the driver fail once with this code, after so many that go well."""
        self.library.omFakeFail(call.encode(), ctypes.c_int64(after), code)

    def execute(self, *kernels: str) -> None:
        """Run these kernels in spite of `no_kernels`."""
        for name in kernels:
            self.library.omFakeExecute(name.encode())

    def count(self, name: str) -> int:
        """Calls of a function; or `kernels`, `nodes`, `copies`, `copied_bytes`, `synchronizations`."""
        return int(self.library.omFakeCount(name.encode()))

    def forget_counts(self) -> None:
        self.library.omFakeForgetCounts()

    def problems(self) -> list[str]:
        """What was found since the last call, each once."""
        found = []
        while text := self.library.omFakeProblem(ctypes.c_int64(self._num_taken)):
            found.append(text.decode())
            self._num_taken += 1
        return found

    def host(self, at: int, num_bytes: int, kind: int) -> None:
        """Report an access of the host, as native code does through `om_host_access`."""
        self.library.omHostAccess(ctypes.c_void_p(at), ctypes.c_int64(num_bytes), kind)


def nvrtc(mode: str = "race") -> str:
    """The path of the fake NVRTC, which compiles for the fake driver in this mode of `shim.py`."""
    os.environ["OFFLOAD_MOE_SHIM"] = f"{sys.executable} {shim.SHIM / 'shim.py'} {mode}"
    return str(library("fake_nvrtc.cpp"))


@cache
def library(source: str) -> Path:
    text = "".join(file.read_text() for file in sorted(shim.SHIM.glob("*.[ch]*")))
    text += "".join((CSRC / name).read_text() for name in ("card_driver.h", "om_kernels.h", "api.h"))
    text += "".join((shim.KERNELS / name).read_text() for name in ("pass.h", "params.h"))
    path = shim.CACHE / f"{Path(source).stem}-{hashlib.sha256((text + ' '.join(FLAGS)).encode()).hexdigest()[:24]}.so"
    if not path.exists():
        shim.CACHE.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=shim.CACHE) as folder:
            built = Path(folder) / "built.so"
            command = [
                os.environ.get("CXX", "g++"),
                *FLAGS,
                f"-I{CSRC}",
                str(shim.SHIM / source),
                "-o",
                str(built),
                "-ldl",
            ]
            subprocess.run(command, check=True)
            os.replace(built, path)
    return path
