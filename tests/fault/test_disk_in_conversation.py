"""A disk that fails, stalls or vanishes in mid-answer: a named error, no hang, and the next question works."""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.chat import chat_store, say
from support.disk import disk_that, failing, pread
from support.pressure import wait_until_quiet
from support.short_of_slots import short_of_slots

from offload_moe.chat import ChatSession
from offload_moe.engine.model import Model
from offload_moe.errors import TransferError
from offload_moe.memory.disk import DiskMover
from offload_moe.native.kernels import Reads
from offload_moe.native.reads import ReadAt
from offload_moe.store import Store

NUM_SLOTS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def model(store: Path) -> Iterator[Model]:
    with short_of_slots(store, NUM_SLOTS) as model:
        yield model


def reads_of(model: Model) -> Reads:
    mover = model.engine.hierarchy.ram.mover
    assert isinstance(mover, DiskMover)
    return mover.reads


@contextmanager
def spoiled(model: Model, wrong: ReadAt, after: int = 20) -> Iterator[threading.Event]:
    """Reads go wrong after that many; the event is set when they do."""
    left, begun = [after], threading.Event()

    def read_at(*arguments: int) -> int:
        left[0] -= 1
        if left[0] >= 0:
            return pread(*arguments)
        begun.set()
        return wrong(*arguments)

    with disk_that(reads_of(model), read_at):
        yield begun


def ask_anew(model: Model, session: ChatSession, expected: str) -> None:
    """Once the reads have ended that were under way when the answer failed."""
    wait_until_quiet(model.engine.hierarchy.ram)
    session.reset()
    assert say(session, "Hello") == expected


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.ESTALE])
def test_a_disk_that_fails_in_an_answer(model: Model, number: int) -> None:
    session, undisturbed = model.chat(), model.chat()
    expected = say(undisturbed, "Hello")
    with spoiled(model, failing(number)) as begun:
        with pytest.raises(TransferError, match=r"expert \d of layer \d .*experts-00001.safetensors at offset \d+"):
            say(session, "Hello")
        assert begun.is_set()
    ask_anew(model, session, expected)


def test_the_answer_can_be_asked_for_again(model: Model) -> None:
    session, undisturbed = model.chat(), model.chat()
    for question in ("One", "Two"):
        expected = say(undisturbed, question)
    say(session, "One")
    with spoiled(model, failing(errno.EIO), after=0), pytest.raises(TransferError):
        say(session, "Two")
    wait_until_quiet(model.engine.hierarchy.ram)
    again = "".join(piece.text for piece in session.retry(temperature=0, max_new_tokens=12))
    assert again == expected


def test_a_disk_that_stops_answering(model: Model) -> None:
    session, undisturbed = model.chat(), model.chat()
    expected = say(undisturbed, "Hello")
    gate = threading.Event()

    def stuck(*arguments: int) -> int:
        gate.wait(30)  # then it answers, and no error is raised any more
        return pread(*arguments)

    model.engine.hierarchy.ram.stall_limit_s = 0.2
    with spoiled(model, stuck):
        with pytest.raises(TransferError, match="did not arrive within"):
            say(session, "Hello")
        gate.set()  # the disk is back
    model.engine.hierarchy.ram.stall_limit_s = 60
    ask_anew(model, session, expected)


def test_a_store_that_is_replaced_by_nothing_and_comes_back(store: Path, model: Model) -> None:
    """What an unplugged disk does: open files fail, and so does opening them again."""
    session, undisturbed = model.chat(), model.chat()
    expected = say(undisturbed, "Hello")
    hidden = store.with_name("hidden")
    with spoiled(model, failing(errno.EIO)):
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
        reads_of(model).check_again()
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
