"""GGUF files of strangers: opened as `info`, `plan` and `load` do, or refused by name, soon and in little memory.

The inputs follow from seeds, so a failure names the seed that repeats it. `python -m tests.fault.test_fuzz_gguf FIRST
LAST` tries others.
"""

import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload_moe.errors import OffloadMoeError
from offload_moe.plan.machine import Machine
from offload_moe.plan.plan import make_plan
from offload_moe.store.in_place import make_view
from tests.support.gguf_fuzz import Sample, write_mutated
from tests.support.gguf_models import write_model

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
FAMILIES = ("qwen3_moe", "deepseek_v3", "qwen3_5_moe_text")
QUICK, MANY = 200, 3000
MOST_SECONDS, MOST_KIB = 5.0, 1 << 20
MACHINE = Machine(ram_bytes=4 << 30)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    return samples_in(tmp_path_factory.mktemp("gguf"))


def samples_in(folder: Path) -> dict[str, Sample]:
    return {family: Sample.of(write_model(folder / family, family).path) for family in FAMILIES}


class Expired(BaseException):
    """Nothing that catches every Exception takes it for a fault of the file."""


@contextmanager
def limited() -> Iterator[None]:
    """Raises: Expired where the processor has been used too long inside; AssertionError for too much memory."""

    def expire(*_: object) -> None:
        raise Expired(f"longer than {MOST_SECONDS} s")

    before, memory = signal.signal(signal.SIGPROF, expire), peak()
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert peak() - memory < MOST_KIB, f"{peak() - memory} KiB"


def opens(path: Path, folder: Path) -> bool:
    """Whether the file can be used as it lies; by the ways of `ensure_view`, `info` and `plan`."""
    try:
        make_plan(make_view([path], folder, "mutated"), MACHINE)
    except OffloadMoeError:
        return False
    return True


def fuzz(samples: dict[str, Sample], folder: Path, seeds: range) -> int:
    """How many files could be used."""
    used = 0
    for seed in seeds:
        family = FAMILIES[seed % len(FAMILIES)]
        path, view = folder / "model.gguf", folder / "view"
        write_mutated(samples[family], path, random.Random(seed))
        try:
            with limited():
                used += opens(path, view)
        except BaseException as error:
            raise AssertionError(f"{family}, seed {seed}: {error!r}") from error
        shutil.rmtree(view, ignore_errors=True)
    return used


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_nearly_right_files_are_used_or_refused(samples: dict[str, Sample], tmp_path: Path) -> None:
    assert 0.1 * QUICK < fuzz(samples, tmp_path, range(QUICK)) < 0.9 * QUICK


@pytest.mark.slow
def test_many_nearly_right_files(samples: dict[str, Sample], tmp_path: Path) -> None:
    assert fuzz(samples, tmp_path, range(QUICK, QUICK + MANY)) > 0.1 * MANY


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made, seeds = samples_in(Path(temporary)), range(int(sys.argv[1]), int(sys.argv[2]))
        failures = 0
        for seed in seeds:
            try:
                fuzz(made, Path(temporary), range(seed, seed + 1))
            except AssertionError as error:
                failures += 1
                print(str(error)[:400], flush=True)
        print(f"{len(seeds)} files, {failures} failures")
