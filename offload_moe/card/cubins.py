"""Programs of kernels compiled for a card, kept in the user's cache: a second load compiles nothing."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import offload_moe.native
from offload_moe.card.nvrtc import Nvrtc
from offload_moe.system.folders import delete_file, make_folder
from offload_moe.system.paths import cache_dir
from offload_moe.system.whole_files import write_whole

KERNELS = Path(offload_moe.native.__file__).with_name("cuda")
# Floats as decision 064 has them: nothing contracted, subnormal numbers kept, division and square root rounded once.
ARITHMETIC = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
MOST_KEPT = 256  # cubins; a model has a few
_MOST_THREADS = 4
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class Compiler:
    """Compiles programs for one architecture. A program includes `kernels.cuh` and names its kernels with sizes."""

    nvrtc: Nvrtc
    architecture: int
    folder: Path | None = None  # of the cubins; the user's cache by default

    def images(self, programs: Sequence[str]) -> list[bytes]:
        """Cubins of these programs, several compiled at a time. Raises: DevicePassUnavailable."""
        if not programs:
            return []
        with ThreadPoolExecutor(min(_MOST_THREADS, len(programs))) as pool:
            return list(pool.map(self.image, programs))

    def image(self, program: str) -> bytes:
        """The cubin of a program, compiled unless it is kept. Raises: DevicePassUnavailable."""
        path = self._folder / f"{self._key(program)}.cubin"
        if kept := _read(path):
            return kept
        image, _ = self.nvrtc.compile(program, self.options())
        with suppress(OSError):  # a cache that cannot be written costs a compilation at each load
            _write(path, image)
            _drop_oldest(self._folder)
        return image

    @property
    def _folder(self) -> Path:
        return self.folder or cache_dir() / "cubins"

    def options(self) -> list[str]:
        """How programs are compiled."""
        return [f"--gpu-architecture=sm_{self.architecture}", "--std=c++17", *ARITHMETIC, f"-I{KERNELS}"]

    def _key(self, program: str) -> str:
        """A hash of all that the cubin depends on but where the sources lie."""
        parts = [str(self.nvrtc), str(self.architecture), *ARITHMETIC, program]
        parts += [file.read_text(encoding="utf-8") for file in sorted(KERNELS.iterdir()) if file.is_file()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    """What `_write` wrote, or None if it is not there or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    image = data[_DIGEST_BYTES:]
    return image if image and hashlib.sha256(image).digest() == data[:_DIGEST_BYTES] else None


def _write(path: Path, image: bytes) -> None:
    make_folder(path.parent)
    write_whole(path, hashlib.sha256(image).digest() + image)


def _drop_oldest(folder: Path) -> None:
    """Keep the newest: other versions of the kernels or of NVRTC leave theirs behind."""
    files = sorted(folder.glob("*.cubin"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[MOST_KEPT:]:
        delete_file(file)
