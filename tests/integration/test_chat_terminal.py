"""The chat at a real terminal, keys and all, over a tiny model."""

import json
import sys
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
    thinker.expect("1+1")
    thinker.expect("thinker is ready.")
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


@pytest.mark.parametrize(("keys", "status"), [("\x03", 130), ("\x04", 0), ("/exit\r", 0)])
def test_a_prompt_is_left_while_the_model_loads(keys: str, status: int, tmp_path: Path) -> None:
    """The load never ends by itself."""
    with open_chat(tmp_path, "stuck") as terminal:
        terminal.expect("50%")
        terminal.send("half a thought")
        terminal.expect("half a thought")
        terminal.interrupt_prompt()  # throws it away
        terminal.expect("\n>")
        terminal.send(keys)
        assert terminal.wait() == status
    assert "Traceback" not in terminal.raw


def test_an_interrupt_leaves_while_a_message_waits_for_the_model(tmp_path: Path) -> None:
    with open_chat(tmp_path, "stuck") as terminal:
        terminal.expect("50%")
        terminal.line("/help")
        terminal.expect("Ctrl-D leaves.")
        terminal.line("hello")
        terminal.expect("━━")  # a bar, in place of the prompt
        terminal.send("\x03")
        assert terminal.wait() == 130
    assert "Traceback" not in terminal.raw


def test_a_load_that_fails_ends_the_prompt(tmp_path: Path) -> None:
    with open_chat(tmp_path, "corrupt") as terminal:
        terminal.expect("\n>")
        terminal.send("half a thought")
        terminal.expect("error: Expert 3 of layer 1 does not match its checksum. Quantize the model again.")
        assert terminal.wait() == 1
    assert "Traceback" not in terminal.raw


def test_a_load_that_fails_ends_a_message_that_waits_for_it(tmp_path: Path) -> None:
    with open_chat(tmp_path, "corrupt") as terminal:
        terminal.expect("\n>")
        terminal.line("hello")
        terminal.expect("error: Expert 3 of layer 1")
        assert terminal.wait() == 1


def test_notices_of_a_load_come_before_the_line_that_is_typed(tmp_path: Path) -> None:
    with open_chat(tmp_path, "loud") as terminal:
        terminal.expect("\n>")
        terminal.send("hel")
        terminal.expect("mind the card")
        terminal.expect("loud is ready.")
        terminal.expect("hel")
        terminal.line("lo")
        terminal.expect("Hello, friend.")
        terminal.expect("\n>")
        terminal.send("\x04")
        terminal.expect("closed")
        assert terminal.wait() == 0


SLOWLY = """
import importlib, sys, time
from tests.support.cli import fake_load_module, load_cli
main = load_cli()
importlib.import_module("offload_moe_cli.loading").check_model = lambda *_: None
sys.modules["offload_moe.engine.load"] = fake_load_module()
chat = importlib.import_module("offload_moe_cli.commands.chat")
chat.announce = lambda model: (print(model.summary, flush=True), time.sleep(0.5))
sys.exit(main.main(["chat", "thinker"]))
"""


def test_keys_that_come_while_the_model_is_announced_keep_their_meaning(tmp_path: Path) -> None:
    """In a mode of the terminal that edits lines, Ctrl-D would be taken out of what is typed, and never arrive."""
    with Terminal([sys.executable, "-c", SLOWLY], cwd=ROOT, env=environment(tmp_path)) as terminal:
        terminal.expect("RAM 4.0 GiB of 16.0 GiB")
        terminal.send("\x04")
        assert terminal.wait() == 0
