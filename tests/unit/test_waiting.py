"""The line that says how far a prompt is."""

import io
import time
from collections.abc import Generator
from types import SimpleNamespace

import pytest

from offload_moe.chat import Piece
from tests.support.cli import load_cli

load_cli()

from offload_moe_cli import waiting  # noqa: E402


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Answer:
    def __init__(self) -> None:
        self.text = ""

    def write(self, piece: Piece) -> None:
        self.text += piece.text

    def end(self) -> None:
        self.text += "|"


def pieces_after(session: SimpleNamespace, shown: io.StringIO | None) -> Generator[Piece, None, None]:
    """An answer after two chunks of a prompt; with `shown`, each lasts until its number is on the terminal."""
    for done in (512, 1024):
        session.prompt_progress = (done, 1536)
        deadline = time.monotonic() + (10 if shown is not None else 0.08)
        while time.monotonic() < deadline and (shown is None or f"{done:,} of" not in shown.getvalue()):
            time.sleep(0.01)
    yield Piece("answer", "a")
    yield Piece("answer", "b")


@pytest.mark.parametrize(
    ("term", "after"), [("xterm", ("\x1b[K", "\r\x1b[K")), ("dumb", ("\r", "\r" + " " * 46 + "\r"))]
)
def test_a_long_prompt_shows_how_far_it_is(term: str, after: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, answer, session = Terminal(), Answer(), SimpleNamespace(prompt_progress=(512, 1536))
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(waiting, "DELAY_S", 0.01)
    monkeypatch.setattr(waiting, "INTERVAL_S", 0.01)
    waiting.show_answer(session, pieces_after(session, terminal), answer)
    assert answer.text == "ab|"
    first, second = (
        f"\rReading the prompt: {text}{after[0]}" for text in ("512 of 1,536 tokens, 33%", "1,024 of 1,536 tokens, 67%")
    )
    assert terminal.getvalue().startswith(first)
    assert second in terminal.getvalue()
    assert terminal.getvalue().endswith(after[1])


def test_a_short_prompt_and_a_pipe_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = SimpleNamespace(prompt_progress=(0, 0))
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        if not stream.isatty():
            monkeypatch.setattr(waiting, "DELAY_S", 0.0)
        waiting.show_answer(session, pieces_after(session, None), Answer())
        assert stream.getvalue() == ""
