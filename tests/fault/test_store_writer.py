"""The writer, stopped at every write, sync and rename, and before each half-written piece: resumed, the same bytes."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_moe.errors import BudgetError, StoreError, TransferError
from offload_moe.store import durable, is_store
from offload_moe.store.journal import JOURNAL_NAME, Journal
from offload_moe.store.plan import Blob, plan_files, record_blob
from offload_moe.store.writer import Payload, StoreWriter

SETTINGS = {"codec": "nf4", "source": "model"}
DENSE = [Blob(name=f"dense.{i}", dtype=torch.bfloat16, shape=(i, 3), num_bytes=6 * i) for i in range(1, 4)]
EXPERTS = [record_blob(f"layers.0.experts.{i}", 4096 * (1 + i % 2)) for i in range(5)]
FILES = plan_files("dense", DENSE) + plan_files("experts", EXPERTS, file_bytes=3 * 4096)
BLOBS = [blob for file in FILES for blob in file.blobs]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs are counted and interrupted here; what they do is the kernel's affair."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """What no handler of ours may catch, as with SIGKILL."""


def payloads(start: int) -> Iterator[Payload]:
    for index, blob in enumerate(BLOBS[start:], start):
        data = bytes((index * 31 + i) % 251 for i in range(blob.num_bytes))
        half = len(data) // 2
        yield [memoryview(data[:half]), memoryview(data[half:])]


def convert(folder: Path) -> int:
    """Run or resume; how many blobs were written this time."""
    with StoreWriter(folder, FILES, SETTINGS) as writer:
        before = writer.num_done
        for _ in writer.write(payloads(before)):
            pass
        writer.finish("the manifest", {"config.json": b"{}", "additional_chat_templates/tool.jinja": b"x"})
    return len(BLOBS) - before


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Saboteur:
    """Counts the operations of `durable` and stops the world at one of them, a write half done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int, error: BaseException | None = None) -> None:
        self.count = 0
        self._stop_at, self._error = stop_at, error or Killed()
        for name in ("write_at", "sync", "publish"):
            monkeypatch.setattr(durable, name, self._wrap(getattr(durable, name), name == "write_at"))

    def _wrap(self, operation: Callable[..., None], is_write: bool) -> Callable[..., None]:
        def wrapped(*arguments: Any) -> None:
            self.count += 1
            if self.count == self._stop_at and is_write:
                descriptor, data, offset = arguments
                operation(descriptor, data[: len(data) // 2], offset)
            if self.count == self._stop_at:
                raise self._error
            if self.count > self._stop_at and isinstance(self._error, Killed):
                raise AssertionError("written after the kill")
            operation(*arguments)

        return wrapped


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    assert convert(folder) == len(BLOBS)
    return content(folder)


def num_operations(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        saboteur = Saboteur(patch, stop_at=1 << 30)
        convert(folder)
    return saboteur.count


def test_what_is_written_reaches_the_disk_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dirty pages that pile up would prolong the last sync of a file."""
    before = num_operations(tmp_path / "at the end")
    monkeypatch.setattr("offload_moe.store.writer.FLUSH_BYTES", 1)
    assert num_operations(tmp_path / "each") == before + len(BLOBS)


def test_killed_at_every_operation_then_resumed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    total = num_operations(tmp_path / "counted")
    assert total > 2 * len(BLOBS)
    for stop_at in range(1, total + 1):
        folder = tmp_path / str(stop_at)
        with pytest.MonkeyPatch.context() as patch:
            Saboteur(patch, stop_at)
            with pytest.raises(Killed):
                convert(folder)
        assert not is_store(folder)
        convert(folder)
        assert content(folder) == undisturbed, stop_at


def test_killed_at_every_operation_of_the_resumed_run_too(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    for stop_at in range(1, 20):
        folder = tmp_path / str(stop_at)
        for point in (stop_at, stop_at, 3):
            with pytest.MonkeyPatch.context() as patch:
                Saboteur(patch, point)
                with pytest.raises(Killed):
                    convert(folder)
        convert(folder)
        assert content(folder) == undisturbed, stop_at


def test_killed_between_the_manifest_and_the_journal(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(journal: Journal) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", killed)
        with pytest.raises(Killed):
            convert(tmp_path / "store")
    assert is_store(tmp_path / "store")
    assert convert(tmp_path / "store") == 0
    assert content(tmp_path / "store") == undisturbed


def stop_after(folder: Path, num_blobs: int) -> None:
    with StoreWriter(folder, FILES, SETTINGS) as writer:
        for _ in zip(range(num_blobs), writer.write(payloads(0)), strict=False):
            pass


def test_only_the_unfinished_is_done_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    for num_blobs in range(1, len(BLOBS) + 1):
        folder = tmp_path / str(num_blobs)
        stop_after(folder, num_blobs)
        assert convert(folder) == len(BLOBS) - num_blobs
        assert content(folder) == undisturbed


def test_data_that_a_power_cut_took_is_written_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    folder = tmp_path / "store"
    stop_after(folder, len(DENSE) + 2)
    part = next(folder.glob("experts-*.part"))
    with part.open("r+b") as file:
        file.seek(len(FILES[1].header) + EXPERTS[0].num_bytes + 10)
        file.write(b"\0" * 100)
    assert convert(folder) == len(BLOBS) - len(DENSE) - 1
    assert content(folder) == undisturbed


@pytest.mark.parametrize("damage", [b"", b"12", b"zzzzzzzz\n", b"0000000"])
def test_a_torn_journal_line_counts_as_not_written(
    tmp_path: Path, undisturbed: dict[str, bytes], damage: bytes
) -> None:
    folder = tmp_path / "store"
    stop_after(folder, 3)
    with (folder / JOURNAL_NAME).open("ab") as file:
        file.write(damage)
    assert convert(folder) == len(BLOBS) - 3
    assert content(folder) == undisturbed


def test_a_full_disk_is_named_and_resumed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    folder = tmp_path / "store"
    for stop_at in (1, 2, 3, 9, 12, 6):
        with pytest.MonkeyPatch.context() as patch:
            Saboteur(patch, stop_at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            with pytest.raises(BudgetError, match=r"is full.*run the same command again to resume"):
                convert(folder)
        assert not is_store(folder)
    convert(folder)
    assert content(folder) == undisturbed


def test_another_write_error_is_named(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Saboteur(patch, 8, OSError(errno.EIO, os.strerror(errno.EIO)))
        with pytest.raises(TransferError, match=r"Writing to .* failed: Input/output error"):
            convert(tmp_path / "store")


def test_too_small_a_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BudgetError, match=r"more on the disk of .* is free"):
        convert(tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == [JOURNAL_NAME]


def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    stop_after(tmp_path / "store", 2)
    with pytest.raises(StoreError, match="begun with another codec"):
        StoreWriter(tmp_path / "store", FILES, SETTINGS | {"codec": "int8"})
    convert(tmp_path / "store")


def test_two_writers_at_once(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path / "store", FILES, SETTINGS),
        pytest.raises(StoreError, match="being written by another process"),
    ):
        StoreWriter(tmp_path / "store", FILES, SETTINGS)


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"not empty and not ours \(thesis\.tex\)"):
        convert(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        convert(tmp_path / "thesis.tex")
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_finished_store_is_not_overwritten(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    convert(tmp_path / "store")
    with pytest.raises(StoreError, match="already a finished store"):
        convert(tmp_path / "store")
    assert content(tmp_path / "store") == undisturbed


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    convert(tmp_path / "store")
