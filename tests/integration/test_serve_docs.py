"""What docs/serve.md shows: its commands of the shell, of curl, and of Python."""

import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from offload_moe.engine.model import Model
from offload_moe.serve.app import App
from offload_moe.serve.host import Host
from tests.support.chat import chat_store
from tests.support.cli import ROOT, load_cli
from tests.support.serving import URL, chat, listening, open_tiny

PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
SHOWN = re.compile(r"^    offload-moe (serve .+)$", re.MULTILINE)
CURL = re.compile(r"^    (curl .+)$", re.MULTILINE)
PYTHON = re.compile(r"^```py\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_tiny(tmp_path_factory.mktemp("store")) as model:
        yield model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("mixtral"), max_position_embeddings=4096)


@pytest.mark.parametrize("command", SHOWN.findall(PAGE))
def test_commands_serve(
    command: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a free port, with a small model: each answers one request."""
    (tmp_path / "key.txt").write_text("sesame\n")
    shutil.copytree(store, tmp_path / "mixtral-store")
    monkeypatch.chdir(tmp_path)

    def answer_once(host: Host, listener: socket.socket, *, drain_s: float, on_ready: Callable[[], None]) -> bool:
        on_ready()
        app = App(host)
        with TestClient(app, base_url=URL, headers={"x-api-key": "sesame"}) as client:
            assert chat(client)["model"] == "mixtral-store"
        app.close()
        listener.close()
        return False

    monkeypatch.setattr("offload_moe.serve.server.serve", answer_once)
    arguments = shlex.split(command.replace("demo", "mixtral-store"))
    assert load_cli().main([*arguments, "--port", "0", "--vram", "0", "--context", "2048"]) == 0
    assert "mixtral-store is served at http://127.0.0.1:" in capsys.readouterr().out


@pytest.mark.parametrize("command", CURL.findall(PAGE))
def test_curl(command: str, model: Model) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    with listening(model) as (host, port):
        command = command.replace(ADDRESS, f"{host}:{port}")
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["object"] == "chat.completion"


@pytest.mark.parametrize("code", PYTHON.findall(PAGE), ids=["openai", "anthropic"])
def test_clients_of_python(code: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(code.split()[1])
    with listening(model) as (host, port):
        file = tmp_path / "example.py"
        file.write_text(code.replace(ADDRESS, f"{host}:{port}") + f"{os.linesep}client.close()\n")
        runpy.run_path(str(file))
    assert capsys.readouterr().out


def test_the_page_shows_commands() -> None:
    assert len(SHOWN.findall(PAGE)) >= 3
    assert len(PYTHON.findall(PAGE)) == 2
    assert CURL.findall(PAGE)
