"""The prompt of a chat: keys, pastes, completion, and the file of what was typed."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from offload_moe.system.paths import state_dir
from tests.support.cli import load_cli

load_cli()

from offload_moe_cli.chat.completion import CommandCompleter  # noqa: E402
from offload_moe_cli.chat.history import MessageHistory  # noqa: E402
from offload_moe_cli.chat.prompt import CancelledError, Prompt  # noqa: E402

PASTE, END_OF_PASTE = "\x1b[200~", "\x1b[201~"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("hello\r", "hello"),
        (f"{PASTE}one\ntwo\n\nthree{END_OF_PASTE}\r", "one\ntwo\n\nthree"),
        (f"see: {PASTE}a\r\nb \\\rc{END_OF_PASTE} ok\r", "see: a\nb \\\nc ok"),
        (f'{PASTE}"""Docstring."""\nx = 1{END_OF_PASTE}\r', '"""Docstring."""\nx = 1'),
        ("one \\\rtwo\r", "one \ntwo"),
        ('"""one\rtwo\r"""\r', "one\ntwo"),
        ('"""one\rtwo"""\r', "one\ntwo"),
        ('"""all on one"""\r', "all on one"),
        (f'"""\r{PASTE}a\nb{END_OF_PASTE}\r"""\r', "a\nb"),
        ("one\x1b\rtwo\r", "one\ntwo"),
    ],
)
def test_messages_at_the_prompt(keys: PipeInput, tmp_path: Path, typed: str, message: str) -> None:
    keys.send_text(typed)
    assert Prompt(MessageHistory(tmp_path / "history")).read() == message


def test_what_follows_a_message_is_kept_for_the_next(keys: PipeInput, tmp_path: Path) -> None:
    keys.send_text(f"one\r{PASTE}two\nlines{END_OF_PASTE}\rthree\r")
    prompt = Prompt(MessageHistory(tmp_path / "history"))
    assert [prompt.read() for _ in range(3)] == ["one", "two\nlines", "three"]
    assert list(MessageHistory(tmp_path / "history").load_history_strings()) == ["three", "two\nlines", "one"]


@pytest.mark.parametrize(("typed", "was_empty"), [("abc\x03", False), ("\x03", True)])
def test_an_interrupt_says_whether_a_line_was_lost(
    keys: PipeInput, tmp_path: Path, typed: str, was_empty: bool
) -> None:
    keys.send_text(typed)
    with pytest.raises(CancelledError) as error:
        Prompt(MessageHistory(tmp_path / "history")).read()
    assert error.value.was_empty == was_empty


def test_the_end_of_input_leaves(keys: PipeInput, tmp_path: Path) -> None:
    keys.send_text("\x04")
    with pytest.raises(EOFError):
        Prompt(MessageHistory(tmp_path / "history")).read()


@pytest.mark.parametrize(
    ("typed", "is_yes"), [("y\r", True), ("Yes\r", True), ("\r", False), ("n\r", False), ("\x03", False)]
)
def test_only_yes_is_yes(keys: PipeInput, tmp_path: Path, typed: str, is_yes: bool) -> None:
    prompt = Prompt(MessageHistory(tmp_path / "history"))
    keys.send_text(typed)
    assert prompt.confirm("Overwrite?") is is_yes
    assert not (tmp_path / "history").exists()


def completions(line: str) -> list[str]:
    return [found.text for found in CommandCompleter().get_completions(Document(line), CompleteEvent())]


def test_tab_completes_commands_settings_and_files(tmp_path: Path) -> None:
    (tmp_path / "talk.json").touch()
    assert completions("/s") == ["/system", "/set", "/stats", "/save"]
    assert completions("/set t") == ["temperature", "top_p", "top_k"]
    assert completions(f"/load {tmp_path}/ta") == ["lk.json"]
    assert completions("/frob x") == completions("s") == completions("/reset ") == completions("text\n/s") == []


def test_history_is_private_and_in_a_folder_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history"
    old_mask = os.umask(0)
    try:
        MessageHistory(path).store_string("what is\nan expert 🙂")
    finally:
        os.umask(old_mask)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(MessageHistory(path).load_history_strings()) == ["what is\nan expert 🙂"]


def test_a_damaged_history_loses_only_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(b'"first"\n\xff\xfe\x00\n{"a": 1}\n"" \n' + b"[" * 100_000 + b'\n"second"\n"half of a li')
    history = MessageHistory(path)
    history.store_string("third")
    assert list(MessageHistory(path).load_history_strings()) == ["third", "second", "first"]


def test_a_history_that_cannot_be_used_does_not_hinder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/proc/nowhere/history"), tmp_path / "folder", tmp_path / "pipe"):
        history = MessageHistory(path)
        history.store_string("hello")
        assert list(history.load_history_strings()) == []


def _append(path: Path, word: str) -> None:
    for _ in range(200):
        MessageHistory(path).store_string(word * 500)


def test_chats_share_a_history(tmp_path: Path) -> None:
    path = tmp_path / "history"
    processes = [multiprocessing.get_context("fork").Process(target=_append, args=(path, word)) for word in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    messages = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(messages) == ["a" * 500] * 200 + ["b" * 500] * 200


def test_the_folder_of_the_history_follows_the_platform(tmp_path: Path) -> None:
    assert state_dir({"OFFLOAD_MOE_CACHE": "/c", "XDG_STATE_HOME": "/s"}, "linux") == Path("/c")
    assert state_dir({"XDG_STATE_HOME": "/s"}, "linux") == Path("/s/offload_moe")
    for environ in ({}, {"XDG_STATE_HOME": "relative"}):
        assert state_dir(environ, "linux") == Path.home() / ".local" / "state" / "offload_moe"
    assert state_dir({}, "darwin") == Path.home() / "Library" / "Caches" / "offload_moe"
