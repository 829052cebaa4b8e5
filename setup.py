"""The native CPU kernels, as an optional extension: without a compiler the install succeeds and torch serves instead.

Everything else about the package is in pyproject.toml.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

SOURCES = Path("offload_moe/native/csrc")
COMMON_FLAGS = [
    "-std=c11",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mavx512vnni"]
X86_FLAGS = {
    "isa_avx2.c": AVX2_FLAGS,
    "isa_avx512.c": AVX512_FLAGS,
    "isa_avx512_vbmi.c": [*AVX512_FLAGS, "-mavx512vbmi"],
}


class BuildKernels(build_ext):
    """Compiles each instruction set with its own flags; the library is loaded through ctypes and imports no Python."""

    def build_extension(self, ext: Extension) -> None:
        if sys.platform == "win32":
            raise CCompilerError("the kernels need POSIX threads")
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects: list[str] = []
        for source in ext.sources:
            flags = X86_FLAGS.get(Path(source).name, []) if is_x86 else []
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                depends=ext.depends,
                extra_postargs=[*COMMON_FLAGS, *flags],
            )
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, libraries=["m", "pthread"], build_temp=self.build_temp)

    def warn(self, msg: object) -> None:
        if "building extension" in str(msg):
            msg = f"native CPU kernels skipped, torch's own operators serve instead: {msg}"
        super().warn(msg)


setup(
    ext_modules=[
        Extension(
            "offload_moe.native._native",
            sources=[str(path) for path in sorted(SOURCES.glob("*.c"))],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
