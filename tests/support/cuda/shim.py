"""Compiles CUDA C++ for the CPU (`cuda_shim.h`) and launches its kernels; as a program: for the fake NVRTC."""

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

SHIM = Path(__file__).parent
ROOT = SHIM.parents[2]
KERNELS = ROOT / "offload_moe" / "native" / "cuda"
CACHE = Path(tempfile.gettempdir()) / f"offload-moe-shim-{os.getuid()}"
BASE_FLAGS = [
    "-std=c++17",
    "-g",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-w",
]
SUFFIXES = (".h", ".cuh", ".cu", ".cpp")
DEFAULT_MODE = os.environ.get("OM_SHIM_MODE", "plain")  # one of:
MODES = {
    "plain": ["-O2"],
    "quick": ["-O0", "-g0"],  # to compile, for programs that run once
    "asan": [
        "-O1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
    ],
    "race": ["-O1", "-DOM_SHIM_TRACE=1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],
}
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(")


class ShimError(RuntimeError):
    """A kernel does not compile: the compiler's output. Or it has races: each one's line and threads."""


class _Entry(ctypes.Structure):
    """`shim::entry`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("num_bytes", ctypes.c_uint64),
        ("run", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)),
    )


class ShimLibrary:
    """Kernels compiled for the CPU."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.entries: dict[str, _Entry] = {}
        at = ctypes.addressof(ctypes.c_char.in_dll(self.library, "shim_kernels"))
        while (entry := _Entry.from_address(at)).name is not None:
            self.entries[entry.name.decode()] = entry
            at += ctypes.sizeof(_Entry)

    def launch(
        self, name: str, grid: Sequence[int], block: Sequence[int], params: ctypes.Structure, *, seed: int = 0
    ) -> None:
        """Run a kernel. Seed 0: threads and blocks in ascending order, 1: descending, others: at random.

        Raises: ShimError in a build of mode "race", where two threads touch a byte unordered.
        """
        entry = self.entries[name]
        if entry.num_bytes != ctypes.sizeof(params):
            raise ValueError(f"{name} takes {entry.num_bytes} bytes of parameters, not {ctypes.sizeof(params)}")
        dims = [(ctypes.c_uint * 3)(*(*sizes, 1, 1)[:3]) for sizes in (grid, block)]
        entry.run(ctypes.addressof(params), ctypes.addressof(dims[0]), ctypes.addressof(dims[1]), seed)
        if races := self.races():
            raise ShimError(f"{name}:\n" + "\n".join(races))

    def races(self) -> list[str]:
        """The races of the launches since the last call; none but in a build of mode "race"."""
        if not hasattr(self.library, "shim_races"):
            return []
        self.library.shim_races.restype = ctypes.c_int64
        text, found = ctypes.c_char_p(), []
        while self.library.shim_races(ctypes.byref(text)):
            found.append((text.value or b"").decode())
        return found


def has_compiler() -> bool:
    return shutil.which(compiler()[0]) is not None


def load(source: str | Path, macros: Mapping[str, object] | None = None, *, mode: str = DEFAULT_MODE) -> ShimLibrary:
    """Compile a file of `native/cuda` (or one at a path of its own) and load it. Raises: ShimError."""
    path = KERNELS / source
    defines = [f"-D{name}={value}" for name, value in (macros or {}).items()]
    return _loaded(build(path.read_text(), [*defines, f"-I{path.parent}"], mode=mode))


def build(text: str, options: Iterable[str] = (), *, mode: str = DEFAULT_MODE) -> Path:
    """The library of this text, compiled unless it is there; options: -D and -I. Raises: ShimError."""
    options = list(options)
    path = CACHE / f"{_key(text, options, mode)}.so"
    if not path.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            _compile(text, options, mode, Path(folder))
            os.replace(Path(folder) / "kernels.so", path)
    return path


def kernel_names(text: str) -> list[str]:
    return _KERNEL.findall(text)


@cache
def _loaded(path: Path) -> ShimLibrary:
    return ShimLibrary(path)


def compiler() -> list[str]:
    """The words of the C++ compiler's command."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _compile(text: str, options: list[str], mode: str, folder: Path) -> None:
    source = folder / "kernels.cpp"
    names = [f"SHIM_KERNEL({name})" for name in kernel_names(_preprocessed(text, options, folder))]
    source.write_text(
        f'#include "cuda_shim.h"\n#include "entries.h"\n#line 1 "kernels.cu"\n{text}\nSHIM_KERNELS({" ".join(names)})\n'
    )
    library = folder / "kernels.so"
    if mode != "race":
        _run([*_command(mode), *options, str(source), "-o", str(library)])
        return
    objects = [
        str(folder / name) for name in ("kernels.o", "trace.o")
    ]  # the flag is for kernels; trace.cpp is its runtime
    _run([*_command(mode), *options, "-c", str(source), "-o", objects[0]])
    _run([*_command("plain"), "-O3", "-DOM_SHIM_TRACE=1", "-c", str(SHIM / "trace.cpp"), "-o", objects[1]])
    _run([*compiler(), "-shared", *objects, "-o", str(library)])


def _preprocessed(text: str, options: list[str], folder: Path) -> str:
    """With macros expanded, but for CUDA's words: kernels may be written by macros."""
    source = folder / "names.cpp"
    source.write_text(text)
    return _run([*compiler(), "-E", "-P", "-DOM_SHIM=1", *options, str(source)])


def _command(mode: str) -> list[str]:
    fma = ["-mfma"] if os.uname().machine == "x86_64" else []
    return [*compiler(), *BASE_FLAGS, *MODES[mode], *fma, f"-I{SHIM}"]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ShimError(done.stderr[-4000:])
    return done.stdout


def _key(text: str, options: list[str], mode: str) -> str:
    """A hash of all that decides what the compiler writes, included files among it."""
    digest = hashlib.sha256("\0".join([text, *options, *_command(mode)]).encode())
    folders = [SHIM, *(Path(option[2:]) for option in options if option.startswith("-I"))]
    for file in sorted(file for folder in folders for file in folder.iterdir() if file.suffix in SUFFIXES):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


if __name__ == "__main__":  # shim.py MODE OPTIONS... < TEXT: prints the library's path
    try:
        print(build(sys.stdin.read(), sys.argv[2:], mode=sys.argv[1]))
    except ShimError as error:
        sys.exit(str(error))
