"""A disk that fails, lies or stops while a native run reads from it: a named error, and the next question works."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.chat import chat_store, say
from support.pressure import wait_until_quiet
from support.short_of_slots import short_of_slots

from offload_moe.decode.span import LayerSpan, _StallWatchdog
from offload_moe.engine.model import Model
from offload_moe.errors import TransferError
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


@contextmanager
def broken(model: Model) -> Iterator[None]:
    """The open files of the store lead to a pipe, of which nobody reads at an offset."""
    (file,) = model.engine.hierarchy.ram.mover._files._files.values()
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


def test_what_a_run_cannot_read_the_mover_reads(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens the file anew."""
    expected = say(model.chat(), "Hello")
    mover, by_mover = model.engine.hierarchy.ram.mover, []
    start = mover.start

    def start_and_note(key: int, *args: object, **settings: object) -> None:
        by_mover.append(key)
        start(key, *args, **settings)

    with broken(model):
        mover._files._replaced += mover._files._files.values()
        mover._files._files.clear()
        with monkeypatch.context() as patch:
            patch.setattr(mover, "start", start_and_note)
            assert say(model.chat(), "Hello") == expected
    assert by_mover


def test_damage_is_named_though_a_run_read_it(store: Path, model: Model) -> None:
    expected = say(model.chat(), "Hello")
    reserved = model.engine.hierarchy.ram.reserved
    assert reserved is not None
    (path,) = store.glob("experts-*")
    content = path.read_bytes()
    num_keys = len(reserved.reads._is_checked)
    records = [model.store.record(*divmod(key, 8)) for key in range(num_keys)]
    damaged = bytearray(content)
    for record in records:
        damaged[record.offset] ^= 1
    model.engine.hierarchy.ram.mover._checked.clear()
    for key in range(num_keys):
        reserved.reads._is_checked[key] = 0
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
