"""The native library, which the package cannot do without. Everything else about the package is in pyproject.toml."""

import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

sys.path.insert(0, str(Path(__file__).parent))
from build_backend import (
    AVX_VNNI_FLAGS,
    COMMON_FLAGS,
    IS_WINDOWS,
    IS_X86,
    X86_FLAGS,
    ZIG_FLAGS,
    ZIG_LINK_FLAGS,
    accepts,
    choose_compiler,
    is_zig,
)

SOURCES = Path("offload_moe/native/csrc")
LIBRARIES = ["pthread"] if IS_WINDOWS else ["m", "pthread", "dl"]


class BuildKernels(build_ext):
    """Compiles each instruction set with its own flags; the library is loaded through ctypes and imports no Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{os.path.join(*fullname.split('.'))}{'.dll' if IS_WINDOWS else '.so'}"

    def run(self) -> None:
        try:
            self.command = choose_compiler()
        except RuntimeError as error:
            raise CCompilerError(str(error)) from error
        os.environ["CC"] = shlex.join(self.command)  # setuptools reads it
        os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")  # on macOS: a Python for two processors
        with tempfile.TemporaryDirectory() as cache:
            os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", cache)
            os.environ.setdefault("ZIG_LOCAL_CACHE_DIR", cache)
            super().run()

    def build_extension(self, ext: Extension) -> None:
        flags, link_flags = COMMON_FLAGS, []
        if is_zig(self.command):
            flags, link_flags = [*COMMON_FLAGS, *ZIG_FLAGS], ZIG_LINK_FLAGS
            # It takes few of the flags that Python was built with.
            linker = [*self.command, *ZIG_FLAGS, "-shared"]
            self.compiler.set_executables(compiler_so=[*self.command, "-fPIC"], linker_so=linker)
        x86_flags = X86_FLAGS if IS_X86 else {}
        if IS_X86 and not accepts(self.command, AVX_VNNI_FLAGS):
            x86_flags = {**X86_FLAGS, "panel_avx_vnni.c": []}
        objects: list[str] = []
        for source in ext.sources:
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                depends=ext.depends,
                extra_postargs=[*flags, *x86_flags.get(Path(source).name, [])],
            )
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, libraries=LIBRARIES, extra_postargs=link_flags, build_temp=self.build_temp
        )
        for unused in Path(target).parent.glob("*.lib"):  # Windows' linkers write what other libraries would link with
            unused.unlink()


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "offload_moe.native._native",
            sources=[str(path) for path in sorted(SOURCES.glob("*.c"))],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
