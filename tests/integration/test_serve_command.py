"""`offload-moe serve` as a process: what it prints, a request, signals, addresses, and what is refused at once."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from offload_moe.cluster.replica import Job
from offload_moe.errors import ConfigError
from offload_moe.serve.host import Host
from offload_moe.system.durations import parse_duration
from tests.support.chat import chat_store
from tests.support.cli import INSTALLED, ROOT, environment, load_cli

READY = re.compile(r"(\S+) is served at http://127\.0\.0\.1:(\d+) ")
LIMIT_S = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("served"), max_position_embeddings=4096)


def start(store: Path, *flags: str) -> "subprocess.Popen[str]":
    arguments = ["serve", str(store), "--port", "0", "--ram", "2GiB", *flags]
    return subprocess.Popen(
        [sys.executable, "-c", INSTALLED, *arguments],
        cwd=ROOT,
        env=environment(store.parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def serving(store: Path, *flags: str) -> "Iterator[tuple[subprocess.Popen[str], int, list[str]]]":
    """The process, its port, and the lines it printed."""
    process = start(store, *flags)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        found = READY.match(lines[0])
        assert found is not None, (lines, process.stderr and process.stderr.read())
        yield process, int(found[2]), lines
    finally:
        process.kill()
        process.communicate()


def post(port: int, path: str = "/v1/chat/completions", headers: Any = None, **body: Any) -> tuple[int, Any]:
    document = {"model": "x", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3} | body
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)) as connection:
        connection.request("POST", path, json.dumps(document), {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_it_answers_with_a_key_and_lets_answers_end(store: Path, tmp_path: Path) -> None:
    key = tmp_path / "key.txt"
    key.write_text("open-sesame\nanything else\n")
    headers = {"Authorization": "Bearer open-sesame"}
    with serving(store, "--api-key-file", str(key)) as (process, port, lines):
        assert lines[0].startswith("store is served at")
        assert f"http://127.0.0.1:{port}/v1/chat/completions" in lines[1]
        assert "open-sesame" not in "".join(lines)
        done = subprocess.run(
            lines[1],
            shell=True,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={"KEY": "open-sesame", "PATH": os.environ["PATH"]},
        )
        if done.returncode != 127:  # curl is here
            assert json.loads(done.stdout)["model"] == "store"
        assert post(port)[0] == 401
        answers: list[tuple[int, Any]] = []
        thread = threading.Thread(
            target=lambda: answers.append(post(port, headers=headers, max_tokens=300, ignore_eos=True))
        )
        thread.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        thread.join(LIMIT_S)
        out, error = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, out) == (130, "")
        assert "Traceback" not in error
        [(status, answer)] = answers
        assert (status, answer["usage"]["completion_tokens"]) == (200, 300)


@pytest.mark.parametrize(
    ("num_signals", "flags"),
    [pytest.param(2, (), id="a second", marks=pytest.mark.slow), pytest.param(1, ("--drain", "1s"), id="the limit")],
)
def test_answers_that_go_on_are_ended(store: Path, num_signals: int, flags: tuple[str, ...]) -> None:
    """By a second signal, or at the end of the time. Streams end with an error, also where nobody reads."""
    asked = {"model": "x", "prompt": "Once", "max_tokens": 3000, "n": 16, "ignore_eos": True, "stream": True}
    with serving(store, "--parallel", "2", *flags) as (process, port, _), socket.socket() as slow:
        body = json.dumps(asked)
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        request = f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{body}".encode()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        slow.sendall(request)
        with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as reader:
            reader.sendall(request)
            assert reader.recv(10)
            for _ in range(num_signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            answer = b"".join(iter(lambda: reader.recv(65536), b""))
        _, error = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, "Traceback" in error) == (0, False), error
        assert b'"code":"shutting_down"' in answer


def test_an_address_in_use_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_cli()
    monkeypatch.setattr("offload_moe_cli.commands.serve.load_model", lambda _: pytest.fail("loads"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert load_cli().main(["serve", "demo", "--port", str(port)]) == 1
        assert capsys.readouterr().err.startswith(f"error: Cannot listen on 127.0.0.1:{port}: ")


@pytest.mark.parametrize(("flags", "is_warned"), [([], True), (["--api-key-file", "key.txt"], False)])
def test_an_open_address_without_a_key_is_warned_of(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    is_warned: bool,
) -> None:
    def be_ready(host: Host, listener: socket.socket, *, drain_s: float, on_ready: Callable[[], None]) -> bool:
        on_ready()
        host.close()
        listener.close()
        return False

    monkeypatch.setattr("offload_moe.serve.server.serve", be_ready)
    monkeypatch.chdir(tmp_path)
    Path("key.txt").write_text("secret")
    assert load_cli().main(["serve", str(store), "--host", "0.0.0.0", "--port", "0", "--ram", "2GiB", *flags]) == 0
    streams = capsys.readouterr()
    assert ("warning: 0.0.0.0 may be reached from other machines" in streams.err) == is_warned
    assert "is served at http://127.0.0.1:" in streams.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "99999"], "Port 99999 is not usable"),
        (["--keep-alive", "soon"], "Cannot read 'soon' as a duration"),
        (["--parallel", "0"], "parallel is 0"),
        (["--api-key-file", "nonexistent"], "nonexistent"),
        (["--ignore-prefix", "("], "no regular expression"),
    ],
)
def test_flags_are_checked_first(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):  # wrong usage
        assert load_cli().main(["serve", "demo", *flags]) == 1
    assert words in capsys.readouterr().err


def test_durations() -> None:
    assert [parse_duration(text) for text in ("30s", "10m", "1.5h", "2D")] == [30, 600, 5400, 172800]
    for text in ("", "10", "0s", "-1m", "1e9s", "999999d", "m"):
        with pytest.raises(ConfigError):
            parse_duration(text)


@pytest.mark.parametrize("module", ["starlette", "uvicorn"])
def test_the_extra_is_named_where_it_is_missing(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert load_cli().main(["serve", "demo"]) == 1
    assert "pip install 'offload-moe[serve]'" in capsys.readouterr().err


def test_an_ingress_says_that_it_loads_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def be_ready(job: Job, _: object, listener: socket.socket, *, on_ready: Callable[[], None]) -> bool:
        assert job.drain_s == 7
        assert "Loading libraries" in capsys.readouterr().err
        listener.close()
        on_ready()
        return False

    for module in ("ray", "httpx2"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setitem(sys.modules, "offload_moe.cluster.serving", serving := ModuleType("serving"))
    monkeypatch.setattr(serving, "serve_cluster", be_ready, raising=False)
    assert load_cli().main(["serve", "demo", "--ray", "--port", "0", "--drain", "7s"]) == 0
    assert "demo is served at" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["ray", "httpx2"])
def test_without_ray_the_extra_for_it_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setitem(sys.modules, module, None)
    assert load_cli().main(["serve", "demo", "--ray"]) == 1
    assert capsys.readouterr().err.startswith("error: Ray is not installed: pip install 'offload-moe[ray]'")
