"""The chat at a real terminal, keys and all, over a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import ROOT, command, environment

pytest.importorskip("pty", reason="needs a POSIX terminal")

from tests.support.terminal import Terminal


def open_chat(tmp_path: Path, source: str, **changes: str) -> Terminal:
    return Terminal(command("chat", source), cwd=ROOT, env=environment(tmp_path, **changes))


@pytest.fixture
def thinker(tmp_path: Path) -> Iterator[Terminal]:
    with open_chat(tmp_path, "thinker") as terminal:
        yield terminal


def test_a_conversation(tmp_path: Path, thinker: Terminal) -> None:
    thinker.expect("Loading libraries")
    thinker.send("\x1b[200~what is\n1+1\x1b[201~\r")
    thinker.expect("thinker is ready.")
    thinker.expect("\n>", 15)
    assert thinker.expect("hits 75.0%").split("\n\n")[0].endswith("Hm, 1+1.")
    assert "It is 2 é🙂.\n" in thinker.raw.replace("\r", "")
    assert "\x1b[2;3mH" in thinker.raw
    thinker.expect("\n>", 15)

    thinker.send("\x1b[200~two\nlines\x1b[201~")
    thinker.expect("lines")
    thinker.send("\r")
    thinker.expect("cached) · first token")
    thinker.expect("\n>", 15)

    thinker.line("/relod")
    thinker.expect("error: There is no command /relod. Did you mean /load?")
    thinker.expect("\n>", 15)

    thinker.send("half a thought")
    thinker.expect("half a thought")
    thinker.interrupt_prompt()
    thinker.expect("\n>", 15)

    thinker.send("/ret\t")
    thinker.expect("/retry")
    thinker.send("\r")
    thinker.expect("It is 2 é🙂.")
    thinker.expect("(+")
    thinker.expect("\n>", 15)

    thinker.line(f"/save {tmp_path}/talk.json")
    thinker.expect("Saved to")
    thinker.line(f"/save {tmp_path}/talk.json")
    thinker.expect("[y/N]")
    thinker.line("")
    thinker.expect("Not saved.")
    thinker.line("/reset")
    thinker.expect("A new conversation.")
    thinker.line(f"/load {tmp_path}/talk.json")
    thinker.expect("Loaded 4 messages.")
    thinker.expect("\n>", 15)
    thinker.send("\x04")
    assert thinker.wait() == 0

    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["content"] for message in messages] == [
        "what is\n1+1",
        "It is 2 é🙂.",
        "two\nlines",
        "It is 2 é🙂.",
    ]
    history = [json.loads(line) for line in (tmp_path / "chat_history.jsonl").read_text().splitlines()]
    assert history[:3] == ["what is\n1+1", "two\nlines", "/relod"]


def test_an_interrupt_stops_the_answer_and_keeps_the_conversation(tmp_path: Path) -> None:
    with open_chat(tmp_path, "endless", NO_COLOR="1") as terminal:
        terminal.expect("\n>", 15)
        terminal.line("laugh")
        terminal.expect("ha ha ha ha")
        terminal.send("QQQ")
        terminal.expect("ha ha ha ha")
        terminal.send("\x03")
        terminal.expect("stopped")
        terminal.expect("\n>", 15)
        terminal.line(f"/save {tmp_path}/talk.json")
        terminal.expect("Saved to")
        terminal.line("/set max_new_tokens 4")
        terminal.expect("max_new_tokens is 4.")
        terminal.line("once more")
        terminal.expect("cached)")
        terminal.expect("stopped at 4 tokens")
        terminal.line("/exit")
        assert terminal.wait() == 0
    # What is typed into an answer does not show in it.
    assert "QQQ" not in terminal.raw
    assert not [code for code in ("\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[38;") if code in terminal.raw]
    user, assistant = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert user["content"] == "laugh"
    assert assistant["content"].startswith("ha ha ha ha")


def test_an_interrupt_while_loading_leaves(tmp_path: Path) -> None:
    """Not while libraries are imported: what becomes of an interrupt there is theirs to say."""
    with open_chat(tmp_path, "stuck") as terminal:
        terminal.expect("Loading libraries")
        terminal.expect("Reading experts")
        terminal.send("\x03")
        assert terminal.wait() == 130
    assert "Traceback" not in terminal.raw
