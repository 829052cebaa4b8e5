"""A disk that fails, stalls or vanishes in mid-answer: a named error, no hang, and the next question works."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.chat import chat_store, say
from support.pressure import wait_until_quiet
from support.short_of_slots import short_of_slots

from offload_moe.chat import ChatSession
from offload_moe.engine.model import Model
from offload_moe.errors import TransferError
from offload_moe.store import Store

NUM_SLOTS = 3
Preadv = Callable[[int, list[memoryview], int], int]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def model(store: Path) -> Iterator[Model]:
    with short_of_slots(store, NUM_SLOTS) as model:
        yield model


def spoil(monkeypatch: pytest.MonkeyPatch, spoiled: Callable[[Preadv], Preadv], after: int = 20) -> threading.Event:
    """Reads go wrong after that many; the event is set when they do."""
    real, left, begun = os.preadv, [after], threading.Event()
    wrong = spoiled(real)

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        left[0] -= 1
        if left[0] >= 0:
            return real(descriptor, buffers, offset)
        begun.set()
        return wrong(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return begun


def ask_anew(model: Model, session: ChatSession, expected: str) -> None:
    """Once the reads have ended that were under way when the answer failed."""
    wait_until_quiet(model.engine.hierarchy.ram)
    session.reset()
    assert say(session, "Hello") == expected


def refuse(number: int) -> Callable[[Preadv], Preadv]:
    def wrong(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(number, os.strerror(number))

    return lambda real: wrong


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.ESTALE])
def test_a_disk_that_fails_in_an_answer(model: Model, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    session, undisturbed = model.chat(), model.chat()
    expected = say(undisturbed, "Hello")
    with monkeypatch.context() as patch:
        begun = spoil(patch, refuse(number))
        with pytest.raises(TransferError, match=r"expert \d of layer \d .*experts-00001.safetensors at offset \d+"):
            say(session, "Hello")
        assert begun.is_set()
    ask_anew(model, session, expected)


def test_the_answer_can_be_asked_for_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session, undisturbed = model.chat(), model.chat()
    for question in ("One", "Two"):
        expected = say(undisturbed, question)
    say(session, "One")
    with monkeypatch.context() as patch:
        spoil(patch, refuse(errno.EIO), after=0)
        with pytest.raises(TransferError):
            say(session, "Two")
    wait_until_quiet(model.engine.hierarchy.ram)
    again = "".join(piece.text for piece in session.retry(temperature=0, max_new_tokens=12))
    assert again == expected


def test_a_disk_that_stops_answering(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session, undisturbed = model.chat(), model.chat()
    expected = say(undisturbed, "Hello")
    gate = threading.Event()

    def stuck(real: Preadv) -> Preadv:
        def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            gate.wait(30)  # then it answers, and no error is raised any more
            return real(descriptor, buffers, offset)

        return preadv

    model.engine.hierarchy.ram.stall_limit_s = 0.2
    with monkeypatch.context() as patch:
        spoil(patch, stuck)
        with pytest.raises(TransferError, match="did not arrive within"):
            say(session, "Hello")
        gate.set()  # the disk is back
    model.engine.hierarchy.ram.stall_limit_s = 60
    ask_anew(model, session, expected)


def test_a_store_that_is_replaced_by_nothing_and_comes_back(
    store: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an unplugged disk does: open files fail, and so does opening them again."""
    session, undisturbed = model.chat(), model.chat()
    expected = say(undisturbed, "Hello")
    hidden = store.with_name("hidden")
    with monkeypatch.context() as patch:
        spoil(patch, refuse(errno.EIO))
        store.rename(hidden)
        try:
            with pytest.raises(TransferError, match="No such file"):
                say(session, "Hello")
        finally:
            hidden.rename(store)
    ask_anew(model, session, expected)


def test_damage_on_the_disk_is_named_and_other_experts_go_on(store: Path, model: Model) -> None:
    """A record that was never read before is damaged: only answers that need it fail."""
    record = Store.open(store).record(0, 5)
    content = record.path.read_bytes()
    damaged = bytearray(content)
    damaged[record.offset] ^= 1
    with record.path.open("r+b") as file:
        file.write(damaged)
    try:
        model.engine.hierarchy.ram.mover._checked.clear()
        with (
            pytest.raises(TransferError, match=r"expert 5 of layer 0.*checksum"),
            model.engine.hierarchy.ram.acquire(0, [5]) as lease,
        ):
            list(lease)
        with model.engine.hierarchy.ram.acquire(0, [4]) as lease:
            assert [expert for wave in lease for expert, _ in wave] == [4]
    finally:
        with record.path.open("r+b") as file:
            file.write(content)
    with model.engine.hierarchy.ram.acquire(0, [5]) as lease:
        assert [expert for wave in lease for expert, _ in wave] == [5]
