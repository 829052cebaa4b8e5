"""The command line among other programs: encodings, closed streams, readers that leave, piped prompts."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import ROOT, command, environment, fake_load_module, load_cli

main = load_cli()
ANSWER = "It is 2 é🙂.\n"


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that `run` and `chat` send to a model that answers nothing."""
    sent: list[str] = []

    def send(text: str, **_: Any) -> Iterator[Any]:
        sent.append(text)
        yield from ()

    module = fake_load_module()
    load = module.load

    def fake(*arguments: Any, **settings: Any) -> Any:
        model = load(*arguments, **settings)
        chat = model.chat

        def watched(**options: Any) -> Any:
            session = chat(**options)
            session.send = send
            return session

        model.chat = watched
        return model

    module.load = fake
    monkeypatch.setitem(sys.modules, "offload_moe.engine.load", module)
    monkeypatch.setattr("offload_moe_cli.loading.check_model", lambda *_: None)  # no such model is installed
    monkeypatch.setattr(main, "quiet_libraries", lambda: None)
    return sent


class Stdin:
    """What a test puts in the place of stdin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._opened: list[io.TextIOWrapper] = []

    def set(self, descriptor: int) -> None:
        self._opened.append(io.TextIOWrapper(os.fdopen(descriptor, "rb"), encoding="utf-8"))
        self._monkeypatch.setattr(sys, "stdin", self._opened[-1])

    def pipe(self, data: bytes) -> int:
        """A pipe that holds `data`; its other end, which is still open."""
        reading, writing = os.pipe()
        os.write(writing, data)
        self.set(reading)
        return writing

    def whole_pipe(self, data: bytes) -> None:
        os.close(self.pipe(data))

    def close(self) -> None:
        for stream in self._opened:
            stream.close()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stdin]:
    given = Stdin(monkeypatch)
    yield given
    given.close()


def test_a_pipe_comes_before_the_prompt(stdin: Stdin, prompts: list[str]) -> None:
    for arguments in (["Sum up."], [], ["-"]):
        stdin.whole_pipe("Zwölf\r\nBoxkämpfer\n".encode())
        assert main.main(["run", "tiny", *arguments]) == 0
    assert prompts == ["Zwölf\nBoxkämpfer\n\nSum up.", "Zwölf\nBoxkämpfer", "Zwölf\nBoxkämpfer"]


@pytest.mark.parametrize("arguments", [[], ["Sum up."], ["-f", "/dev/zero", "Sum up."]])
def test_a_stream_that_never_ends_is_refused(
    arguments: list[str],
    stdin: Stdin,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("offload_moe.system.texts.MOST_BYTES", 1000)
    writing = stdin.pipe(b"y\n" * 501)
    assert main.main(["run", "tiny", *arguments]) == 1
    assert "which is no text for a model" in capsys.readouterr().err
    assert prompts == []
    os.close(writing)


def test_a_file_on_stdin_is_read_unless_somebody_else_reads_it(
    stdin: Stdin, prompts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "list").write_bytes(b"one\ntwo\n")
    for offset in (0, 4):
        descriptor = os.open(tmp_path / "list", os.O_RDONLY)
        os.lseek(descriptor, offset, os.SEEK_SET)
        stdin.set(descriptor)
        assert main.main(["run", "tiny", "Say it."]) == 0
    assert prompts == ["one\ntwo\n\nSay it.", "Say it."]


def test_files_come_first(stdin: Stdin, prompts: list[str], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("alpha\n", encoding="utf-16")
    (tmp_path / "b").write_text("beta", encoding="utf-8")
    stdin.whole_pipe(b"gamma")
    files = ["-f", str(tmp_path / "a"), "--file", str(tmp_path / "b")]
    assert main.main(["run", "tiny", *files, "--temperature", "0", "Compare."]) == 0
    stdin.whole_pipe(b"")
    assert main.main(["run", "tiny", *files]) == 0
    assert prompts == ["alpha\n\nbeta\n\ngamma\n\nCompare.", "alpha\n\nbeta"]


def test_a_pipe_that_says_nothing_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch, stdin: Stdin, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("offload_moe_cli.prompts.GRACE_S", 0.05)
    writing = stdin.pipe(b"")
    assert main.main(["run", "tiny", "Hi"]) == 0
    os.close(writing)
    assert prompts == ["Hi"]
    assert "The pipe on stdin is empty" in capsys.readouterr().err


def test_no_prompt_at_a_terminal_is_not_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, encoding="utf-8") as stream, pytest.raises(SystemExit, match="2"):
        monkeypatch.setattr(sys, "stdin", stream)
        main.main(["run", "tiny"])
    os.close(master)
    assert "give a PROMPT" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["-"], [" "]])
def test_nothing_at_all_is_an_empty_prompt(
    stdin: Stdin, prompts: list[str], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stdin.whole_pipe(b"\n")
    assert main.main(["run", "tiny", *arguments]) == 1
    assert capsys.readouterr().err.startswith("error: The prompt is empty.")
    assert prompts == []


def test_prompts_that_are_not_utf8(
    stdin: Stdin, prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f").write_bytes(b"na\xefve")
    stdin.whole_pipe(b"na\xefve")
    assert main.main(["run", "tiny"]) == 1
    assert "error: stdin is not UTF-8: byte 0xef at offset 2" in capsys.readouterr().err
    assert main.main(["run", "tiny", "x", "-f", str(tmp_path / "f")]) == 1
    assert "f is not UTF-8: byte 0xef at offset 2" in capsys.readouterr().err
    assert main.main(["run", "tiny", "na\udcefve"]) == 1
    assert "PROMPT is not UTF-8: byte 0xef at offset 2" in capsys.readouterr().err
    assert main.main(["chat", "tiny", "--system", "\udcef"]) == 1
    assert "--system is not UTF-8: byte 0xef at offset 0" in capsys.readouterr().err
    assert prompts == []


def test_a_line_that_is_not_utf8_does_not_end_a_chat(
    stdin: Stdin, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stdin.whole_pipe(b'\xef\xbb\xbffirst\nna\xefve\n"""\na block\nwith \xff\n"""\nlast \xc3\xa9\n')
    assert main.main(["chat", "tiny"]) == 1
    assert prompts == ["first", "last é"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert [error.partition(" (")[0] for error in errors] == [
        "error: This message is not UTF-8: byte 0xef at offset 2",
        "error: This message is not UTF-8: byte 0xff at offset 13",
    ]


def run(
    folder: Path, arguments: Sequence[str], redirections: str = "", **changes: str
) -> "subprocess.CompletedProcess[bytes]":
    """One run of the command line whose streams a shell prepares."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirections}', "sh", *command(*arguments)],
        input=b"hello\n",
        capture_output=True,
        cwd=ROOT,
        env=environment(folder, **changes),
        timeout=120,
        check=False,
    )


def test_an_answer_survives_an_encoding_without_its_characters(tmp_path: Path) -> None:
    result = run(tmp_path, ["chat", "thinker"], PYTHONIOENCODING="cp1252")
    assert (result.returncode, result.stdout) == (0, b"It is 2 \xe9\\U0001f642.\n")
    assert result.stderr.count(b"stdout is in cp1252, which lacks some of these characters") == 1


@pytest.mark.parametrize("closed", ["<&- >&-", "<&- 2>&-"])
def test_closed_streams_are_empty(tmp_path: Path, closed: str) -> None:
    result = run(tmp_path, ["run", "thinker", "x"], closed)
    assert result.returncode == 0
    assert result.stdout.decode() == ("" if ">&-" in closed.split() else ANSWER)
    assert (b"RAM 4.0 GiB" in result.stderr) == ("2>&-" not in closed)


def test_files_do_not_get_the_numbers_of_closed_streams() -> None:
    code = (
        "import os, sys; from tests.support.cli import load_cli; load_cli();"
        "from offload_moe_cli.streams import prepare_streams; prepare_streams();"
        "os._exit(os.open('/dev/zero', os.O_RDONLY) + 10 * sys.stdin.fileno() + 20 * sys.stdout.fileno())"
    )
    shell = ["/bin/sh", "-c", 'exec "$@" <&- >&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(shell, cwd=ROOT, env=environment(ROOT), check=False).returncode == 3 + 0 + 20


@pytest.mark.parametrize(
    ("arguments", "stream", "status"),
    [
        (["run", "thinker", "x"], "stderr", 0),
        (["info", "absent"], "stderr", 1),
        pytest.param(["info", "absent"], "stdout", 1, marks=pytest.mark.slow),
        (["list", "--json"], "stdout", 141),
        pytest.param(["list", "--json"], "stderr", 0, marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_has_left_is_no_error(tmp_path: Path, arguments: list[str], stream: str, status: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    streams: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writing}
    with subprocess.Popen(
        command(*arguments), stdin=subprocess.DEVNULL, cwd=ROOT, env=environment(tmp_path), **streams
    ) as process:
        os.close(writing)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status
    rest = (out or b"") + (err or b"")
    assert not any(word in rest for word in (b"Traceback", b"Exception ignored", b"Broken pipe"))


def test_an_answer_survives_messages_that_cannot_be_written(tmp_path: Path) -> None:
    result = run(tmp_path, ["run", "thinker", "x"], "2>/dev/full")
    assert (result.returncode, result.stdout.decode()) == (0, ANSWER)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, ["list", "--json"], ">/dev/full")
    assert (result.returncode, result.stderr) == (1, b"error: No space left on device\n")


def test_streams_of_a_test_or_a_notebook_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit, match="0"):
        main.main(["--version"])
    assert out.getvalue().startswith("offload-moe ")
