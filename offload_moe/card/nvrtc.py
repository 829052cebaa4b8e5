"""NVIDIA's compiler library, NVRTC: where it is found, and a program compiled for one architecture.

It comes with torch for CUDA, as the package `nvidia-cuda-nvrtc` or with a toolkit. Neither a compiler nor CUDA's
headers are needed on the machine.
"""

import ctypes
import os
import re
import site
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload_moe.errors import DevicePassUnavailable

HOW_TO_GET = "`pip install nvidia-cuda-nvrtc` brings it"
OLDEST_ARCHITECTURE = 75  # what the kernels are compiled for in tests begins with Turing
_MAJORS = (13, 12)
_PATTERNS = ("libnvrtc.so.*", "nvrtc64_*_0.dll")
# Below a folder of packages: of the packages for CUDA 13 and 12, and of torch on Windows.
_PACKAGE_FOLDERS = (
    "nvidia/cu13/lib",
    "nvidia/cu13/bin/x86_64",
    "nvidia/cu13/bin",
    "nvidia/cuda_nvrtc/lib",
    "nvidia/cuda_nvrtc/bin",
    "torch/lib",
)


@dataclass(frozen=True, slots=True)
class Nvrtc:
    """A loaded NVRTC."""

    library: ctypes.CDLL
    version: tuple[int, int]
    architectures: tuple[int, ...]

    def compile(self, text: str, options: Sequence[str]) -> tuple[bytes, str]:
        """The cubin of a program and the compiler's remarks. Raises: DevicePassUnavailable with its first error."""
        program = ctypes.c_void_p()
        name = b"kernels.cu"
        self._check(self.library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name, 0, None, None))
        try:
            words = [option.encode() for option in options]
            code = self.library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
            log = self._bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if code:
                raise DevicePassUnavailable(f"{self} does not compile the kernels: {_first_error(log)}")
            return self._bytes(program, "CUBIN"), log
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]}"

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, code: int) -> None:
        if code:
            self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise DevicePassUnavailable(f"{self} fails: {self.library.nvrtcGetErrorString(code).decode()}")


def load_nvrtc(*, architecture: int, driver_version: int, path: str | None = None) -> Nvrtc:
    """The first NVRTC that compiles for this architecture (86: compute capability 8.6) what the driver loads.

    `driver_version`: the CUDA version of the driver, 1000 * major + 10 * minor. `path`: a library instead of a search.
    Raises: DevicePassUnavailable, which says what was found and why it does not serve.
    """
    if architecture < OLDEST_ARCHITECTURE:
        raise DevicePassUnavailable(
            f"the kernels need sm_{OLDEST_ARCHITECTURE} or newer, and this card is sm_{architecture}"
        )
    reasons = []
    for name in [path] if path else candidates():
        try:
            found = _load(name)
        except (OSError, AttributeError):
            continue
        if reason := _unfit(found, architecture, driver_version):
            reasons.append(reason)
        else:
            return found
    raise DevicePassUnavailable(reasons[0] if reasons else f"NVRTC is not found ({HOW_TO_GET})")


def candidates(environ: Mapping[str, str] | None = None, folders: Sequence[str] | None = None) -> Iterator[str]:
    """Names and paths of NVRTC, the likeliest first: beside torch, in the loader's path, in a toolkit."""
    environ = os.environ if environ is None else environ
    packages = [*sys.path, *site.getsitepackages()] if folders is None else folders
    toolkits = [environ[name] for name in ("CUDA_PATH", "CUDA_HOME") if environ.get(name)] + ["/usr/local/cuda"]
    for package in dict.fromkeys(packages):
        yield from _libraries([Path(package, folder) for folder in _PACKAGE_FOLDERS])
    for major in _MAJORS:
        yield f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    yield from _libraries([Path(toolkit, folder) for toolkit in toolkits for folder in ("lib64", "bin", "bin/x64")])


def _libraries(folders: list[Path]) -> Iterator[str]:
    for folder in folders:
        found = [file for pattern in _PATTERNS for file in folder.glob(pattern)]
        yield from (str(file) for file in sorted(found, reverse=True) if "alt" not in file.name)


def _load(name: str) -> Nvrtc:
    library = ctypes.CDLL(name)
    major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(known)
    return Nvrtc(library, (major.value, minor.value), tuple(known))


def _unfit(nvrtc: Nvrtc, architecture: int, driver_version: int) -> str | None:
    major, minor = driver_version // 1000, driver_version % 1000 // 10
    if nvrtc.version[0] > major:
        return f"{nvrtc} needs a driver for CUDA {nvrtc.version[0]}, and this one has CUDA {major}.{minor}"
    if architecture not in nvrtc.architectures:
        newest = max(nvrtc.architectures, default=0)
        return f"{nvrtc} does not compile for this card, which is sm_{architecture}: its newest is sm_{newest}"
    return None


def _first_error(log: str) -> str:
    found = re.search(r"[^\n]*\berror\b[^\n]*", log)
    return (found[0] if found else log.strip().partition("\n")[0])[:200] or "it does not say why"
