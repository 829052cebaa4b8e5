"""SIGTERM and SIGHUP end a command at once and leave nothing half done; a suspended process goes on where it was."""

import http.client
import json
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload_moe.convert.quantize import quantize
from tests.fault.test_users_machines import content
from tests.support.chat import chat_store
from tests.support.checkpoints import write_checkpoint
from tests.support.cli import INSTALLED, ROOT, command, environment
from tests.support.terminal import Terminal
from tests.support.unreliable import library

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="signals, LD_PRELOAD")]
LIMIT_S = 60
SUSPENDED_S = 3.0
ENDS = [pytest.param(signal.SIGTERM, 143, id="SIGTERM"), pytest.param(signal.SIGHUP, 129, id="SIGHUP")]
SLOW_DISK = {"UNRELIABLE_DELAY": "20000"}
# Reads of a slow disk all the time, with less patience than it is suspended for.
ANSWER = """
import sys
from pathlib import Path
from offload_moe.store.reading import forget_cached
from tests.support.short_of_slots import short_of_slots
store = Path(sys.argv[1])
for file in store.iterdir():
    forget_cached(file)
with short_of_slots(store, 3) as model:
    model.engine.hierarchy.ram.stall_limit_s = 2.0
    for piece in model.chat().send("Hello", temperature=0, max_new_tokens=64):
        print(ascii(piece.text), flush=True)
"""


@pytest.fixture(autouse=True)
def hangups_count() -> Iterator[None]:
    """Also where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("store"), moe_intermediate_size=256, max_position_embeddings=16384)


@contextmanager
def started(folder: Path, code: str, *arguments: str, **changes: str) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment(folder, **changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: "subprocess.Popen[str]", number: int) -> tuple[int, list[str]]:
    """The status after the signal, and the lines of stderr."""
    process.send_signal(number)
    _, error = process.communicate(timeout=LIMIT_S)
    assert "Traceback" not in error
    return process.returncode, error.strip().splitlines()


@pytest.mark.parametrize(("number", "status"), ENDS)
def test_an_answer_ends(number: int, status: int, store: Path, tmp_path: Path) -> None:
    flags = ("--ram", "1GiB", "--max-new-tokens", "15000", "--context", "16384")
    with started(tmp_path, INSTALLED, "run", str(store), "Hi.", *flags) as process:
        assert process.stdout is not None
        assert process.stdout.read(3)
        found, lines = ended(process, number)
    assert (found, lines[-1]) == (status, f"Stopped by {signal.Signals(number).name}.")


def test_under_nohup_an_answer_goes_on(store: Path, tmp_path: Path) -> None:
    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {INSTALLED}"
    with started(tmp_path, ignoring, "run", str(store), "Hi.", "--ram", "1GiB", "--max-new-tokens", "400") as process:
        assert process.stdout is not None
        assert process.stdout.read(3)
        found, _ = ended(process, signal.SIGHUP)
    assert found == 0


@pytest.mark.parametrize(("number", "status"), ENDS)
def test_a_chat_gives_the_terminal_back(number: int, status: int, tmp_path: Path) -> None:
    with Terminal(command("chat", "endless"), cwd=ROOT, env=environment(tmp_path)) as terminal:
        before = termios.tcgetattr(terminal.slave)
        terminal.expect("\n>")
        terminal.line("laugh")
        terminal.expect("ha ha ha ha")
        assert termios.tcgetattr(terminal.slave) != before
        terminal.process.send_signal(number)
        assert terminal.wait() == status
        assert termios.tcgetattr(terminal.slave) == before
    assert "Traceback" not in terminal.raw


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_chat_at_its_prompt_ends(number: int, tmp_path: Path) -> None:
    with Terminal(command("chat", "thinker"), cwd=ROOT, env=environment(tmp_path)) as terminal:
        before = termios.tcgetattr(terminal.slave)
        terminal.expect("\n>")
        terminal.process.send_signal(number)
        assert terminal.wait() == 128 + number
        assert termios.tcgetattr(terminal.slave) == before
    assert "Traceback" not in terminal.raw


@pytest.mark.parametrize(("number", "status"), ENDS)
def test_a_conversion_ends_and_is_resumed(number: int, status: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", num_hidden_layers=2)
    undisturbed = quantize(tmp_path / "model", tmp_path / "undisturbed", codec="nf4")
    disk = SLOW_DISK | {"LD_PRELOAD": str(library()), "UNRELIABLE_UNDER": f"{tmp_path}/model/"}
    arguments = ("quantize", str(tmp_path / "model"), str(tmp_path / "store"), "--codec", "nf4")
    with started(tmp_path, INSTALLED, *arguments, **disk) as process:
        wait_for(tmp_path / "store")
        found, lines = ended(process, number)
    assert (found, lines[-2]) == (status, "Stopped. The same command resumes the conversion.")
    assert not (tmp_path / "store" / "store.json").exists()
    done = quantize(tmp_path / "model", tmp_path / "store", codec="nf4")
    assert content(done) == content(undisturbed)


def test_a_server_whose_terminal_closes_lets_answers_end(store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path) as (process, port):
        stream = Stream(port, max_tokens=2000)
        assert stream.lines(3)
        process.send_signal(signal.SIGHUP)
        text = stream.rest()
        assert text.endswith("data: [DONE]")
        _, error = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, "Traceback" in error) == (0, False), error


def test_a_suspended_answer_goes_on(store: Path, tmp_path: Path) -> None:
    with started(tmp_path, ANSWER, str(store)) as process:
        expected, error = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, error
    disk = SLOW_DISK | {"LD_PRELOAD": str(library()), "UNRELIABLE_UNDER": "experts-"}
    with started(tmp_path, ANSWER, str(store), **disk) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        suspend(process)
        rest, error = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, first + rest) == (0, expected), error


def test_a_suspended_server_goes_on(store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path) as (process, port):
        expected = content_of(Stream(port, max_tokens=1500).rest())
        stream = Stream(port, max_tokens=1500)
        begun = stream.lines(5)
        suspend(process)
        assert content_of(begun + stream.rest()) == expected
        assert content_of(Stream(port, max_tokens=1500).rest()) == expected


def suspend(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(SUSPENDED_S)
    process.send_signal(signal.SIGCONT)


def wait_for(store: Path) -> None:
    """Until a record is written."""
    deadline = time.monotonic() + LIMIT_S
    while not any(path.stat().st_size for path in store.glob("*.part")):
        assert time.monotonic() < deadline, "no record was written"
        time.sleep(0.02)


@contextmanager
def serving(store: Path, folder: Path) -> "Iterator[tuple[subprocess.Popen[str], int]]":
    with started(folder, INSTALLED, "serve", str(store), "--port", "0", "--ram", "2GiB") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield process, int(line.partition("127.0.0.1:")[2].split()[0])


class Stream:
    """A streamed answer of a server."""

    def __init__(self, port: int, max_tokens: int) -> None:
        body = {"model": "x", "prompt": "Once", "max_tokens": max_tokens, "temperature": 0, "stream": True}
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/completions", json.dumps(body | {"ignore_eos": True}), headers)
        self._response = self._connection.getresponse()
        assert self._response.status == 200

    def lines(self, count: int) -> str:
        return "".join(self._response.readline().decode() for _ in range(count))

    def rest(self) -> str:
        text = self._response.read().decode().strip()
        self._connection.close()
        return text


def content_of(stream: str) -> str:
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert stream.endswith("data: [DONE]")
    return "".join(choice["text"] for event in events for choice in event["choices"])
