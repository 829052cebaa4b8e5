"""Disks that are slow, fail or lie, for another process: `unreliable_disk.c` under LD_PRELOAD."""

import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tests.support.cli import ROOT, environment

SOURCE = Path(__file__).with_name("unreliable_disk.c")
COUNTS = struct.Struct("=5q")
LIMIT_S = 120  # nothing may hang


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Reads and writes of the files in question, and what became of them."""

    calls: int
    delayed: int
    shortened: int
    failed: int
    corrupted: int


@dataclass(frozen=True, kw_only=True)
class Done:
    status: int
    out: str
    err: str
    counts: Counts

    @property
    def error(self) -> str:
        """The last line of stderr."""
        return (self.err.strip().splitlines() or [""])[-1]


def on_a_disk(scratch: Path, code: str, *arguments: str, under: str, **settings: int) -> Done:
    """Run Python code where files with `under` in their path lie on a disk as `unreliable_disk.c` describes it.

    settings: in lower case, as in shorten=2.
    """
    counts = scratch / "counts"
    counts.write_bytes(bytes(COUNTS.size))
    disk = {f"UNRELIABLE_{name.upper()}": str(value) for name, value in settings.items()}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(scratch / "cache")
        | {"LD_PRELOAD": str(library()), "UNRELIABLE_COUNTS": str(counts), "UNRELIABLE_UNDER": under}
        | disk,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    numbers = COUNTS.unpack(counts.read_bytes())
    return Done(status=done.returncode, out=done.stdout, err=done.stderr, counts=Counts(**_named(numbers)))


@cache
def library() -> Path:
    """Compiled once per process."""
    path = Path(mkdtemp(prefix="unreliable-")) / "disk.so"
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run(
        [*compiler, "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", path, SOURCE, "-ldl"], check=True
    )
    return path


def _named(numbers: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(Counts.__dataclass_fields__, numbers, strict=True))
