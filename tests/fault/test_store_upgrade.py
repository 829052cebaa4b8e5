"""`verify --upgrade`, stopped at every change to the disk: the store can be read at any moment, and is finished."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_moe.convert import jobs
from offload_moe.convert.quantize import quantize
from offload_moe.errors import BudgetError, StoreCorrupt, StoreError
from offload_moe.store import Store
from offload_moe.store.installed import find, remove
from offload_moe.store.journal import JOURNAL_NAME, UPGRADE_LOCK
from offload_moe.store.plan import Blob, PlannedFile, plan_files
from offload_moe.store.upgrade import upgrade
from tests.support.checkpoints import write_checkpoint
from tests.support.cli import load_cli
from tests.support.stores import assert_same_stores, check_all, to_version_1

CHANGES = ("pwrite", "fsync", "replace", "unlink", "open")


def plan_small_files(prefix: str, blobs: Iterable[Blob], *, first: int) -> list[PlannedFile]:
    return plan_files(prefix, blobs, 4 * 4096 if prefix == "experts" else 1 << 20, first=first)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store of three files as this version writes it, and as version 1 did."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "model", num_hidden_layers=2, num_experts=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "plan_files", plan_small_files)
        store = quantize(folder / "model", folder / "new", codec="nf4", dense_codec="int8")
    assert len(list(store.glob("experts-*"))) == 2
    return store, to_version_1(Path(shutil.copytree(store, folder / "old")))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def old(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "store"))


class Killed(BaseException):
    """The process ends here."""


class Disk:
    """Counts changes to the disk. Change number `last` is half done if it is a write, and none comes after it."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int | None = None) -> None:
        self.names: list[str] = []
        self._last = last
        for name in CHANGES:
            patch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return function(*arguments, **named)
            if self._last is not None and len(self.names) >= self._last:
                if name == "pwrite" and len(self.names) == self._last:
                    function(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                self.names.append("killed")
                raise Killed
            self.names.append(f"{name} {Path(arguments[0]).name}" if name not in ("pwrite", "fsync") else name)
            return function(*arguments, **named)

        return call


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(folder: Path) -> list[Tensor]:
    store = Store.open(folder)
    check_all(store)
    experts = [store.read_expert(layer, expert) for layer in range(len(store.layers)) for expert in range(2)]
    return experts + [store.read_dense(name) for name, entry in sorted(store.dense.items()) if entry.quantized]


def test_an_upgrade_gives_the_bytes_of_this_version(made: tuple[Path, Path], old: Path) -> None:
    reports: list[tuple[Any, ...]] = []
    assert upgrade(old, lambda *report: reports.append(report)) == 3
    new = content(made[0])
    assert content(old).keys() == {name.replace(".safetensors", "-panels.safetensors") for name in new}
    for name, data in content(old).items():
        if name != "store.json":
            assert data == new[name.replace("-panels", "")], name
    manifest = content(old)["store.json"].replace(b"-panels", b"")
    assert manifest.split(b'"checksum"')[0] == new["store.json"].split(b'"checksum"')[0]
    total = sum(len(data) for name, data in new.items() if name.endswith(".safetensors"))
    assert reports[0] == ("Upgrading", 0, total)
    assert reports[-1] == ("Upgrading", total, total)
    assert upgrade(old) == 0
    assert_same_stores(old, made[1])


def test_killed_at_every_change_to_the_disk_then_resumed(made: tuple[Path, Path], tmp_path: Path) -> None:
    expected = records(made[1])
    whole = Path(shutil.copytree(made[1], tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        upgrade(whole)
    upgraded = content(whole)
    assert len(disk.names) > 40
    store = tmp_path / "store"
    for last in range(len(disk.names)):
        shutil.copytree(made[1], store)
        for point in (last, last // 2):  # the resumed run is killed, too
            with pytest.MonkeyPatch.context() as patch:
                Disk(patch, point)
                with suppress(Killed):
                    upgrade(store)
            assert all(map(torch.equal, records(store), expected)), (last, disk.names[last])
        upgrade(store)
        assert content(store) == upgraded, (last, disk.names[last])
        shutil.rmtree(store)


def test_no_file_is_deleted_before_the_manifest_that_replaces_it_is_safe(old: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        upgrade(old)
    steps = [name for name in disk.names if name != "pwrite"]
    start = steps.index("open experts-00001-panels.safetensors.part")
    assert steps[start : start + 9] == [
        "open experts-00001-panels.safetensors.part",
        "fsync",
        "replace experts-00001-panels.safetensors.part",
        "fsync",
        "open store.json.part",
        "fsync",
        "replace store.json.part",
        "fsync",
        "unlink experts-00001.safetensors",
    ]


def test_readers_that_have_opened_a_file_read_on_in_it(old: Path) -> None:
    record = Store.open(old).record(1, 1)
    with record.path.open("rb") as file:
        upgrade(old)
        assert not record.path.exists()
        file.seek(record.offset)
        assert len(file.read(record.num_bytes)) == record.num_bytes


def test_room_for_one_file_is_enough_and_needed(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max(path.stat().st_size for path in old.glob("*.safetensors"))
    usage = shutil.disk_usage(old)
    before = content(old)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=largest - 1))
    with pytest.raises(BudgetError, match="needs room for one more file"):
        upgrade(old)
    assert {**content(old), UPGRADE_LOCK: b""} == {**before, UPGRADE_LOCK: b""}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=largest))
    assert upgrade(old) == 3


def test_a_full_disk_is_named_and_leaves_no_half_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, num_writes = os.pwrite, [0]

    def fails(*arguments: Any) -> int:
        num_writes[0] += 1
        if num_writes[0] == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails)
        with pytest.raises(BudgetError, match=r"is full.*run the same command again"):
            upgrade(old)
    assert not list(old.glob("*.safetensors.part"))
    upgrade(old)
    assert not Store.open(old).files_in_rows()


def test_a_damaged_record_is_not_rewritten(old: Path) -> None:
    record = Store.open(old).record(1, 1)
    with record.path.open("r+b") as file:
        file.seek(record.offset + 30)
        file.write(b"damage")
    damaged = record.path.read_bytes()
    with pytest.raises(StoreCorrupt, match=r"expert 1 of layer 1 .* does not match its checksum.*verify --repair"):
        upgrade(old)
    assert record.path.read_bytes() == damaged
    assert record.path.name in {file.name for file in Store.open(old).files_in_rows()}


@pytest.mark.parametrize("name", ["store.json", "experts-00002.safetensors"])
def test_shared_files_are_refused(name: str, old: Path, tmp_path: Path) -> None:
    before = content(old)
    os.link(old / name, tmp_path / "other")
    with pytest.raises(StoreError, match=rf"{name} has 2 names \(hard links\)"):
        upgrade(old)
    (old / name).unlink()
    (old / name).symlink_to(tmp_path / "other")
    with pytest.raises(StoreError, match=rf"{name} is a link to {tmp_path / 'other'}"):
        upgrade(old)
    (tmp_path / "link").symlink_to(old)
    with pytest.raises(StoreError, match=rf"is a link to {old}\. Upgrade the store by that path"):
        upgrade(tmp_path / "link")
    assert content(old) == before


@pytest.mark.parametrize("name", [".", "store.json", "dense-00001.safetensors"])
def test_a_read_only_store_is_refused(name: str, old: Path) -> None:
    before, mode = content(old), (old / name).stat().st_mode
    (old / name).chmod(mode & ~0o222)
    with pytest.raises(StoreError, match="is read-only"):
        upgrade(old)
    (old / name).chmod(mode)
    assert content(old) == before


def test_two_at_once(old: Path) -> None:
    for name in (UPGRADE_LOCK, JOURNAL_NAME):
        with (old / name).open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for change in (upgrade, lambda path: remove(find(path))):
                with pytest.raises(StoreError, match="is being written by another process"):
                    change(old)
        assert len(Store.open(old).files_in_rows()) == 3
    assert upgrade(old) == 3  # what a finished conversion and a stopped upgrade left
    assert not (old / JOURNAL_NAME).exists()
    assert not (old / UPGRADE_LOCK).exists()


def test_a_stopped_upgrade_can_be_removed(old: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, 30)
        with pytest.raises(Killed):
            upgrade(old)
    assert list(old.glob("*-panels.safetensors*"))
    remove(find(old))
    assert not old.exists()


def test_the_command(old: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    def cli(*arguments: str) -> tuple[int, str, str]:
        status: int = load_cli().main(arguments)
        return status, *capsys.readouterr()

    assert "verify STORE --upgrade" in cli("info", str(old))[1]
    status, out, err = cli("verify", str(old), "--upgrade")
    assert (status, "is intact" in out) == (0, True)
    assert f"Upgraded 3 files of {old}." in err
    assert "Upgrading ..." in err
    assert "upgrade" not in cli("info", str(old))[1]
    status, out, err = cli("verify", str(old), "--upgrade")
    assert (status, "is intact" in out) == (0, True)
    assert "has nothing to upgrade" in err
    with pytest.raises(SystemExit):
        cli("verify", str(old), "--upgrade", "--repair")
    assert "not allowed with argument --upgrade" in capsys.readouterr().err
    assert_same_stores(old, made[0])
