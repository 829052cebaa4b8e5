"""`quantize --delete-source-shards` killed at any moment and run again: the undisturbed store, nothing beside it."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_moe.checkpoint.download import NOTE_NAME
from offload_moe.convert.quantize import quantize
from offload_moe.errors import StoreError
from offload_moe.store import Store, is_store
from tests.support.checkpoints import spread, write_checkpoint
from tests.support.hub import Hub, hub_in_use, running

CHANGES = ("mkdir", "rmdir", "unlink", "replace", "fsync", "ftruncate", "pwrite")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    write_checkpoint(folder, num_hidden_layers=1, num_experts=2)
    spread(folder, per_shard=9)
    return folder


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_in_use(checkpoint, tmp_path / "cache", monkeypatch) as hub:
        yield hub


class Killed(BaseException):
    """The process ends here."""


class Steps:
    """Counts what a process changes on the disk, and ends it before step number `last`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.last: int | None = None
        for name in CHANGES:
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name), lambda *arguments: True))
        monkeypatch.setattr(io, "open", self._counted("open", io.open, opens_to_write))

    def _counted(self, name: str, function: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if counts(*arguments, **named):
                if self.last is not None and len(self.names) >= self.last:
                    raise Killed  # whatever comes later does not happen either
                self.names.append(f"{name} {arguments[0]}")
            return function(*arguments, **named)

        return call

    def run(self, source: str | Path, store: Path, last: int | None = None) -> None:
        """A hub id's shards are deleted, a folder's are not."""
        self.names, self.last = [], last
        try:
            quantize(source, store, dense_codec="int8", delete_source_shards=isinstance(source, str))
        finally:
            self.last = None


def opens_to_write(path: object, mode: str = "r", *others: object, **named: object) -> bool:
    return set(mode) & set("wax+") != set()


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_and_resume(steps: Steps, source: str | Path, tmp_path: Path, choose: Callable[[list[str]], list[int]]) -> None:
    steps.run(source, tmp_path / "undisturbed")
    names, undisturbed = steps.names, content(tmp_path / "undisturbed")
    chosen = choose(names)
    assert len(chosen) > 4
    for last in chosen:
        store, download = tmp_path / str(last), tmp_path / f"{last}.download"
        with pytest.raises(Killed):
            steps.run(source, store, last)
        steps.run(source, store)
        assert content(store) == undisturbed, names[last - 1]
        assert not download.exists(), names[last - 1]


def after_the_manifest(names: list[str]) -> list[int]:
    """When there is nothing left to do but to clean up."""
    manifest = next(index for index, name in enumerate(names) if name.endswith("store.json.part"))
    return list(range(manifest, len(names), 2))  # all of them in slow tests


def all_of_them(names: list[str]) -> list[int]:
    return list(range(1, len(names)))


def test_killed_at_any_step_of_the_end(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_resume(Steps(monkeypatch), "org/tiny", tmp_path, after_the_manifest)


@pytest.mark.slow
def test_killed_at_any_step(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_resume(Steps(monkeypatch), "org/tiny", tmp_path, all_of_them)


@pytest.mark.slow
def test_a_folder_killed_at_any_step(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_resume(Steps(monkeypatch), checkpoint, tmp_path, all_of_them)


def test_a_note_that_was_cut_short_is_written_anew(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "store.download").mkdir()
    (tmp_path / "store.download" / NOTE_NAME).write_text('{"repo_id": "org/ti')
    assert is_store(quantize("org/tiny", tmp_path / "store", delete_source_shards=True))
    assert not (tmp_path / "store.download").exists()


def test_a_finished_store_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    quantize("org/tiny", tmp_path / "store", delete_source_shards=True)
    sent = dict(hub.sent)
    for delete in (False, True):
        with pytest.raises(StoreError, match="already a finished store"):
            quantize("org/tiny", tmp_path / "store", delete_source_shards=delete)
    assert hub.sent == sent
    assert not (tmp_path / "store.download").exists()


def test_our_own_notes_are_not_kept(hub: Hub, tmp_path: Path) -> None:
    quantize("org/tiny", tmp_path / "store", delete_source_shards=True)
    assert NOTE_NAME not in {piece.path.name for piece in Store.open(tmp_path / "store").pieces()}


# Forks children that convert shard by shard and kills each after its delay; prints one status per child.
KILLER = """
import os, random, signal, sys, time
import huggingface_hub, torch
torch.set_num_threads(1)
from offload_moe.convert.quantize import quantize

def start(folder):
    huggingface_hub.close_session()
    child = os.fork()
    if child == 0:
        quantize("org/tiny", folder, delete_source_shards=True)
        os._exit(0)
    return child

begun = time.perf_counter()
os.waitpid(start(sys.argv[1] + "/undisturbed"), 0)
whole = time.perf_counter() - begun
chosen = random.Random(1)
for index in range(int(sys.argv[2])):
    child = start(f"{sys.argv[1]}/{index}")
    time.sleep(chosen.random() * whole)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(status)
    store = f"{sys.argv[1]}/{index}"
    is_over = os.path.exists(store + "/store.json") and not os.path.exists(store + "/conversion.journal")
    if status and not is_over and os.waitpid(start(store), 0)[1]:
        sys.exit(f"number {index} was not resumed")
"""


@pytest.mark.slow
def test_kill_9_while_shards_come_and_go(checkpoint: Path, tmp_path: Path) -> None:
    count = 20
    with running(Hub(checkpoint)) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", KILLER, str(tmp_path), str(count)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    undisturbed = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}
    for index in range(count):
        assert {path.name: path.read_bytes() for path in (tmp_path / str(index)).iterdir()} == undisturbed, index
        assert not (tmp_path / f"{index}.download").exists()
    assert sum(int(status) == 9 for status in result.stdout.split()) >= count // 2
