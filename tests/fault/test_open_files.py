"""Many shards, few open files: no more than some stay open, and where even these are too many the message helps."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offload_moe.checkpoint.shards import Shards
from offload_moe.errors import CheckpointError
from offload_moe.system import open_files
from offload_moe.system.open_files import OpenFiles, open_descriptor
from tests.support.checkpoints import spread, write_checkpoint
from tests.support.reference import read_tensors

# Converts a folder twice, the second time after a stop, then checks and loads the store, with few files open.
SCRIPT = """
import resource, sys
from offload_moe import load, quantize
from offload_moe.store import Store
model, store = sys.argv[1:]
load  # imported before the limit holds
import offload_moe.engine.load
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
steps = 0
def stop(phase, done=-1.0, total=None):
    global steps
    steps += phase == "Quantizing"
    if steps == 20:
        raise KeyboardInterrupt
try:
    quantize(model, store, codec="bf16", progress=stop)
except KeyboardInterrupt:
    pass
quantize(model, store, codec="bf16")
for piece in Store.open(store).pieces():
    piece.check()
print(len(Store.open(store).layers))
"""


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 100)
    return paths


@pytest.fixture
def limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def num_open(folder: Path) -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum(str(folder) in os.readlink(link) for link in links if link.is_symlink())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_no_more_than_some_stay_open(files: list[Path], tmp_path: Path) -> None:
    kept = OpenFiles(num_kept=4)
    for path in [*files, *files[::-1]]:
        with kept.reading(path) as descriptor:
            assert os.pread(descriptor, 1, 0)[0] == files.index(path)
        assert num_open(tmp_path) <= 4
    kept.release(files[0])
    assert num_open(tmp_path) == 3
    kept.close()
    assert num_open(tmp_path) == 0


def test_a_file_that_is_being_read_stays_open(files: list[Path]) -> None:
    kept = OpenFiles(num_kept=2)

    def read(number: int) -> bool:
        path = files[number % len(files)]
        with kept.reading(path) as descriptor:
            return all(os.pread(descriptor, 1, place)[0] == files.index(path) for place in range(100))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))
    with kept.reading(files[0]) as first, kept.reading(files[1]), kept.reading(files[2]), kept.reading(files[3]):
        assert os.pread(first, 1, 0)[0] == 0
    kept.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_reading_a_checkpoint_keeps_few_shards_open(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=2)
    expected = read_tensors(tmp_path)
    spread(tmp_path, per_shard=1)
    shards = Shards(tmp_path)
    assert len(shards.paths) > 30
    for name, tensor in expected.items():
        assert shards.read(name).equal(tensor)
        assert num_open(tmp_path) <= 16
    shards.close()


@pytest.mark.usefixtures("limit")
def test_the_limit_is_raised_where_it_may(files: list[Path]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = max(int(name) for name in os.listdir("/proc/self/fd")) + 3 if Path("/proc/self/fd").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    opened = [open_descriptor(files[0]) for _ in range(lowest)]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > lowest
    for descriptor in opened:
        os.close(descriptor)


def test_too_many_open_files_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=2)

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(open_files.os, "open", refuse)
    monkeypatch.setattr(open_files, "raise_limit", lambda: False)
    with pytest.raises(CheckpointError, match=r"cannot be read: too many open files; allow more, .*ulimit -n"):
        Shards(tmp_path)


def test_many_shards_are_converted_with_few_open_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", num_hidden_layers=5)
    spread(tmp_path / "model", per_shard=1)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 80
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr
