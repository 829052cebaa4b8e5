"""A disk that fails, lies or stops while a native run reads from it: a named error, and the next question works."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.chat import chat_store, say
from support.disk import disk_that, pread
from support.pressure import wait_until_quiet
from support.short_of_slots import short_of_slots

from offload_moe.decode.span import LayerSpan, _StallWatchdog
from offload_moe.engine.model import Model
from offload_moe.errors import TransferError
from offload_moe.memory.disk import DiskMover
from offload_moe.memory.record_file import RecordFiles
from offload_moe.native import reads as native_reads
from offload_moe.native.kernels import TokenPass

NUM_SLOTS = 5
NAMED = r"expert \d of layer \d .*experts-00001.safetensors at offset \d+"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def model(store: Path) -> Iterator[Model]:
    """With slots for a run. One answer has shown that layers make a chain."""
    with short_of_slots(store, NUM_SLOTS) as model:
        say(model.chat(), "Hello")
        yield model
        residency = model.engine.hierarchy.ram.residency
        assert residency.num_reserved == 0
        assert not any(residency.num_leases(slot) for slot in range(NUM_SLOTS))


def files_of(model: Model) -> RecordFiles:
    mover = model.engine.hierarchy.ram.mover
    assert isinstance(mover, DiskMover)
    return mover.transfers._files


@contextmanager
def broken(model: Model) -> Iterator[None]:
    """The open files of the store lead to a pipe, of which nobody reads at an offset."""
    (file,) = files_of(model)._files.values()
    descriptors = [each for each in (file._direct, file._cached) if each is not None]
    kept = [os.dup(each) for each in descriptors]
    ends = os.pipe()
    for each in descriptors:
        os.dup2(ends[0], each)
    try:
        yield
    finally:
        for each, copy in zip(descriptors, kept, strict=True):
            os.dup2(copy, each)
        for each in (*kept, *ends):
            os.close(each)


def break_in_run(monkeypatch: pytest.MonkeyPatch, model: Model, after: int) -> list[int]:
    """The disk fails from so many runs on, for as long as each lasts. Returns what counts the runs."""
    runs: list[int] = []
    call = LayerSpan._follow_pass

    def token_pass(self: LayerSpan, *args: object) -> None:
        runs.append(1)
        if len(runs) <= after:
            call(self, *args)
        else:
            with broken(model):
                call(self, *args)

    monkeypatch.setattr(LayerSpan, "_follow_pass", token_pass)
    return runs


def test_a_disk_that_fails_in_a_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.chat()
    expected = say(model.chat(), "Hello")
    with monkeypatch.context() as patch:
        runs = break_in_run(patch, model, after=3)
        with pytest.raises(TransferError, match=NAMED):
            say(session, "Hello")
        assert len(runs) > 3
    wait_until_quiet(model.engine.hierarchy.ram)
    session.reset()
    assert say(session, "Hello") == expected


def test_what_a_run_cannot_read_is_read_again_from_a_file_that_is_opened_anew(model: Model) -> None:
    expected = say(model.chat(), "Hello")
    files, num_reads = files_of(model), [0]
    ((path, file),) = files._files.items()
    stale = {file._direct, file._cached}
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)  # another file, which has taken its place

    def read_at(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        if descriptor in stale:
            num_reads[0] += 1
            return -errno.ESTALE
        return pread(descriptor, address, num_bytes, offset)

    reads = model.engine.hierarchy.pass_reads
    assert reads is not None
    with disk_that(reads, read_at):
        assert say(model.chat(), "Hello") == expected
    assert num_reads[0] >= 1


def test_damage_is_named_though_a_run_read_it(store: Path, model: Model) -> None:
    expected = say(model.chat(), "Hello")
    reads = model.engine.hierarchy.pass_reads
    assert reads is not None
    (path,) = store.glob("experts-*")
    content = path.read_bytes()
    records = [model.store.record(*divmod(key, 8)) for key in range(reads.num_keys)]
    damaged = bytearray(content)
    for record in records:
        damaged[record.offset] ^= 1
    reads.check_again()
    with path.open("r+b") as file:
        file.write(damaged)
    try:
        with pytest.raises(TransferError, match=r"expert \d of layer \d.*checksum"):
            say(model.chat(), "Hello")
        wait_until_quiet(model.engine.hierarchy.ram)
    finally:
        with path.open("r+b") as file:
            file.write(content)
    assert say(model.chat(), "Hello") == expected


def test_completions_wake_who_waits_and_nothing_is_polled(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = say(model.chat(), "Hello")
    before = model.stats.copy()
    monkeypatch.setattr(native_reads, "POLL_S", 600.0)
    monkeypatch.setattr("offload_moe.memory.waiting.STEP_S", 600.0)
    assert say(model.chat(), "Hello") == expected
    assert model.stats.since(before).num_misses > 20


def test_a_run_in_a_process_that_was_stopped_is_not_given_up() -> None:
    seconds = iter((0.0, 0.1, 3600.0, 3600.1, 3600.2, 3600.4))
    watchdog = _StallWatchdog(SimpleNamespace(clock=lambda: next(seconds)))
    found = [watchdog.since(progress) for progress in ((1,), (1,), (1,), (2,), (2,))]
    assert found == pytest.approx([0.0, 1.0, 1.1, 0.0, 0.2])


def test_a_run_that_makes_no_progress_is_given_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = say(model.chat(), "Hello")
    model.engine.hierarchy.ram.stall_limit_s = 0.05
    with monkeypatch.context() as patch:
        patch.setattr(TokenPass, "next", lambda self, first: None)
        with pytest.raises(TransferError, match="did not arrive within"):
            say(model.chat(), "Hello")
    model.engine.hierarchy.ram.stall_limit_s = 60
    assert say(model.chat(), "Hello") == expected
