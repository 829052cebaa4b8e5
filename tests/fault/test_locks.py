"""File systems without locks: work goes on and the user is told; a lock that is held is something else."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from offload_moe.convert.quantize import quantize
from offload_moe.errors import StoreError
from offload_moe.store import Store, is_store
from offload_moe.store.installed import describe, remove
from offload_moe.store.journal import JOURNAL_NAME, check_not_written
from offload_moe.system.locks import lock_file, try_lock
from tests.support.checkpoints import write_checkpoint
from tests.support.reference import converted

NONE = [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS]


@pytest.fixture
def flock_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def choose(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return choose


@pytest.mark.parametrize("number", NONE)
def test_a_conversion_goes_on_without_locks(number: int, flock_fails: Callable[[int], None], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", num_hidden_layers=2)
    flock_fails(number)
    notices = converted(tmp_path / "model", tmp_path / "store")
    assert [notice for notice in notices if "has no file locks" in notice and str(tmp_path / "store") in notice]
    assert len(Store.open(tmp_path / "store").layers) == 2


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN])
def test_a_lock_that_is_held_is_one(number: int, flock_fails: Callable[[int], None], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", num_hidden_layers=2)
    flock_fails(number)
    with pytest.raises(StoreError, match="is being written by another process"):
        quantize(tmp_path / "model", tmp_path / "store", codec="bf16")
    assert not is_store(tmp_path / "store")


def test_what_is_installed_can_be_looked_at_and_removed(flock_fails: Callable[[int], None], tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_text("{}\n")
    flock_fails(errno.ENOLCK)
    check_not_written(tmp_path)
    entry = describe(tmp_path)
    assert entry is not None
    remove(entry)
    assert not tmp_path.exists()


def test_a_demo_is_built_and_removed_without_locks(flock_fails: Callable[[int], None], tmp_path: Path) -> None:
    flock_fails(errno.ENOLCK)
    with lock_file(tmp_path / "lock", lambda: pytest.fail("waits for nobody")) as state:
        assert state == "unavailable"


def test_locks_where_there_are_some(tmp_path: Path) -> None:
    waited: list[str] = []
    with lock_file(tmp_path / "lock") as state:
        assert state == "locked"
        with lock_file(tmp_path / "lock") as other:
            assert other == "held elsewhere"
        descriptor = os.open(tmp_path / "lock", os.O_RDONLY)
        assert try_lock(descriptor, is_shared=True) == "held elsewhere"
        os.close(descriptor)
    with lock_file(tmp_path / "lock", lambda: waited.append("once")) as state:
        assert state == "locked"
    assert waited == []


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with lock_file(tmp_path / "lock", lambda: os.close(descriptor)) as state:  # the other one ends meanwhile
        assert state == "locked"
