"""The commands of a chat, by themselves."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offload_moe.chat import Piece, TurnStats
from offload_moe.errors import ConfigError
from tests.support.cli import load_cli

load_cli()

from offload_moe_cli.chat import commands  # noqa: E402
from offload_moe_cli.chat.opening import Opened  # noqa: E402
from offload_moe_cli.chat.prompt import CancelledError  # noqa: E402
from offload_moe_cli.chat.repl import run_chat, take_turn  # noqa: E402
from offload_moe_cli.chat.talk import Talk  # noqa: E402


class FakeSession:
    """The surface of a chat session that the loop uses."""

    def __init__(self) -> None:
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []
        self.last_stats: TurnStats | None = None
        self.withdrawn: str | None = None
        self.calls: list[tuple[Any, ...]] = []

    def send(self, text: str, **sampling: Any) -> Iterator[Piece]:
        self.calls.append(("send", text, sampling))
        yield Piece("answer", f"you said {text}")

    def retry(self, **sampling: Any) -> Iterator[Piece]:
        self.calls.append(("retry", sampling))
        yield Piece("answer", "again")

    def reset(self) -> None:
        self.calls.append(("reset",))

    def save(self, path: Path) -> None:
        self.calls.append(("save", path))

    def load(self, path: Path) -> None:
        self.calls.append(("load", path))


@pytest.fixture
def talk() -> Talk:
    model: Any = SimpleNamespace(peaks={"RAM": (2**31, 2**30)}, memory={"experts": 2**30})
    session: Any = FakeSession()
    return Talk(lambda: Opened(model, session), {"seed": 1})


def test_chat_commands(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    session: Any = talk.session
    for line in (
        "/reset",
        "/retry",
        "/save a b.json",
        "/load ~/x.json",
        "/system Be kind.",
        "/set top_k 3",
        "/set seed default",
    ):
        commands.dispatch(talk, line)
    assert session.calls == [
        ("reset",),
        ("retry", {"seed": 1}),
        ("save", Path.cwd().resolve() / "a b.json"),
        ("load", Path("~/x.json").expanduser()),
    ]
    assert session.system == "Be kind."
    assert talk.sampling == {"top_k": 3}
    commands.dispatch(talk, "/system -")
    assert session.system is None
    for line in ("/help", "/stats", "/set", "/system"):
        commands.dispatch(talk, line)
    out, err = capsys.readouterr()
    assert out == "again\n"
    assert all(name in err for name in commands.COMMANDS)
    assert "memory: experts" in err
    assert "RAM at its peak  1.0 GiB, planned 2.0 GiB with the context full" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/frob", "no command /frob"),
        ("/hlep", r"Did you mean /help\?"),
        ("/sta", r"Did you mean /stats\?"),
        ("/QUIT", r"Did you mean /quit\?"),
        ("/set temprature 1", r"Did you mean temperature\?"),
        ("/set temperature nan", "temperature is nan"),
        ("/set temperature -0.5", "temperature is -0.5"),
        ("/set seed 18446744073709551616", "from 0 to 18446744073709551615"),
        ("/set top_k 1.5", "'1.5'.*whole number from 0"),
        ("/load ~nobody-of-that-name/x", "user who does not exist"),
        ("/save", "needs a file name"),
        ("/set warmth 1", "no setting warmth"),
        ("/set top_k lots", "'lots'"),
        ("/set top_p 3", "top_p is 3.0"),
    ],
)
def test_commands_that_cannot_be_done_say_why(talk: Talk, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        commands.dispatch(talk, line)
    assert talk.sampling == {"seed": 1}


@pytest.mark.parametrize("line", ["/exit", "/quit", "/bye", " /exit "])
def test_leaving(talk: Talk, line: str) -> None:
    with pytest.raises(commands.LeaveError):
        commands.dispatch(talk, line)


def test_settings_show_their_values_and_ranges(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    commands.dispatch(talk, "/set seed")
    commands.dispatch(talk, "/set top_p")
    assert capsys.readouterr().err.splitlines() == [
        "seed is 1. It may be a whole number from 0 to 18446744073709551615, or default.",
        "top_p is the default. It may be a number above 0 and at most 1, or default.",
    ]
    assert talk.sampling == {"seed": 1}


@pytest.mark.parametrize(("answer", "calls"), [(True, 1), (False, 0)])
def test_saving_over_a_file_is_confirmed(talk: Talk, tmp_path: Path, answer: bool, calls: int) -> None:
    target, link = tmp_path / "talk.json", tmp_path / "link.json"
    target.write_text("precious")
    link.symlink_to(target)
    questions = []
    talk.confirm = lambda question: questions.append(question) or answer
    commands.dispatch(talk, f"/save {link}")
    assert questions == [f"{link} exists already. Overwrite it?"]
    assert talk.session.calls == [("save", target)] * calls
    commands.dispatch(talk, f"/save {tmp_path}/new.json")
    assert len(questions) == 1


def test_without_a_person_nothing_is_overwritten(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        commands.dispatch(talk, f"/save {tmp_path}/talk.json")


def test_what_is_no_file_is_not_replaced(talk: Talk, tmp_path: Path) -> None:
    talk.confirm = lambda _: True
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", os.devnull):
        with pytest.raises(ConfigError, match="not a regular file"):
            commands.dispatch(talk, f"/save {path}")
    assert talk.session.calls == []


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        ("//etc", ["/etc"]),
        ("/usr/bin\n/usr/lib", ["/usr/bin\n/usr/lib"]),
        ("/reset\nplease", ["/reset\nplease"]),
        ("/system Be kind.\nBe brief.", []),
        (" \n ", []),
    ],
)
def test_a_text_of_several_lines_is_a_message(talk: Talk, message: str, sent: list[str]) -> None:
    take_turn(talk, message)
    assert [call[1] for call in talk.session.calls] == sent
    assert talk.session.system == ("Be kind.\nBe brief." if message.startswith("/system") else None)


@pytest.mark.parametrize(
    ("interrupts", "num_read"),
    [([True, True], 2), ([False, True, True], 3), ([True, False, True, True], 4), ([False, False, False, True], 5)],
)
def test_only_interrupts_of_an_empty_line_leave(
    interrupts: list[bool], num_read: int, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that is thrown away is not half of leaving, so that a conversation is not lost by it."""
    read: list[bool] = []

    class Interrupted:
        confirm = None

        def read(self) -> str:
            read.append(True)
            if len(read) > len(interrupts):
                raise EOFError
            raise CancelledError(was_empty=interrupts[len(read) - 1])

    monkeypatch.setattr("offload_moe_cli.chat.prompt.Prompt", lambda *_: Interrupted())
    talk.is_interactive = True
    assert run_chat(talk) == 0
    assert len(read) == num_read
