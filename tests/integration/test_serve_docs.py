"""What docs/serve.md shows: its commands of the shell, of curl, and of Python."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from offload_moe.engine.model import Model
from offload_moe.serve.app import App
from offload_moe.serve.host import Host
from tests.support.agents import claude_code, codex
from tests.support.chat import chat_store
from tests.support.cli import ROOT, load_cli
from tests.support.clients import run_client
from tests.support.serving import URL, chat, events, listening, served

PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
SHOWN = re.compile(r"^    offload-moe (serve .+)$", re.MULTILINE)
CURL = re.compile(r"^    (curl .+)$", re.MULTILINE)
PYTHON = re.compile(r"^```py\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS = "127.0.0.1:8000"


def block(heading: str) -> str:
    """The indented lines behind a heading."""
    lines = PAGE[PAGE.index(heading) :].splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith("    "))
    end = next(at for at in range(begin, len(lines)) if lines[at] and not lines[at].startswith("    "))
    return textwrap.dedent("\n".join(lines[begin:end]))


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


@pytest.fixture
def short(model: Model) -> Iterator[Model]:
    """Its answers are short where a request sets no limit."""
    before = model.hf.generation_config.max_new_tokens
    model.hf.generation_config.max_new_tokens = 20
    yield model
    model.hf.generation_config.max_new_tokens = before


@pytest.mark.parametrize("code", PYTHON.findall(PAGE), ids=["openai", "anthropic", "litellm"])
def test_clients_of_python(code: str, model: Model, tmp_path: Path) -> None:
    if find_spec(code.split()[1]) is None:
        pytest.skip(f"no {code.split()[1]}")
    with listening(model) as (host, port):
        assert run_client([sys.executable, "-c", code.replace(ADDRESS, f"{host}:{port}")], tmp_path).stdout.strip()


def test_llm(short: Model, tmp_path: Path) -> None:
    if find_spec("llm") is None:
        pytest.skip("no llm")
    settings, *commands = block("**llm**").strip().split("\n\n")
    with listening(short) as (host, port):
        (tmp_path / "extra-openai-models.yaml").write_text(settings.replace(ADDRESS, f"{host}:{port}"))
        said = [
            run_client([sys.executable, "-m", *shlex.split(line)], tmp_path, LLM_USER_PATH=str(tmp_path)).stdout
            for line in "\n".join(commands).splitlines()
        ]
    assert said[0].strip()
    assert said[1].startswith('{"name": "')


@pytest.mark.parametrize("heading", ["**aider**", "**Open WebUI.**"])
def test_exported_variables(heading: str, model: Model) -> None:
    """The address has the models, below which the programs look for them."""
    exported = dict(part.split("=") for part in block(heading).splitlines()[0].split()[1:])
    address = next(value for value in exported.values() if value.startswith("http"))
    with served(model, api_key=exported["OPENAI_API_KEY"]) as client:
        assert address == f"http://{ADDRESS}/v1"
        key = {"Authorization": f"Bearer {exported['OPENAI_API_KEY']}"}
        assert client.get("/v1/models", headers=key).json()["data"][0]["id"] == "tiny"


def test_settings_of_codex(short: Model) -> None:
    settings = tomllib.loads(block("**Codex**"))
    provider = settings["model_providers"][settings["model_provider"]]
    assert (provider["wire_api"], provider["base_url"]) == ("responses", f"http://{ADDRESS}/v1")
    with served(short) as client:
        answer = client.post("/v1/responses", json=codex() | {"model": settings["model"]})
        assert events(answer.text)[-1]["response"]["model"] == "tiny"


def test_settings_of_claude_code(short: Model) -> None:
    settings: dict[str, str] = json.loads(block("**Claude Code**"))["env"]
    assert settings["ANTHROPIC_BASE_URL"] == f"http://{ADDRESS}"
    with served(short, api_key=settings["ANTHROPIC_AUTH_TOKEN"]) as client:
        headers = {"Authorization": f"Bearer {settings['ANTHROPIC_AUTH_TOKEN']}"}
        body = claude_code() | {"model": settings["ANTHROPIC_MODEL"], "max_tokens": 4}
        answer = client.post("/v1/messages", json=body, headers=headers)
        assert events(answer.text)[-1]["type"] == "message_stop"


def test_the_line_of_claude_code_is_removed_as_shown(model: Model) -> None:
    words = next(shlex.split(line) for line in SHOWN.findall(PAGE) if "--ignore-prefix" in line)
    pattern = words[words.index("--ignore-prefix") + 1]
    asked: dict[str, Any] = {"max_tokens": 1, "stream": False}
    with served(model, ignore_prefix=pattern) as client:
        for session in ("0a", "1b"):
            usage = client.post("/v1/messages", json=claude_code(session=session) | asked).json()["usage"]
        assert usage["input_tokens"] == 1
        assert usage["cache_read_input_tokens"] > 100


def test_the_page_shows_commands() -> None:
    assert len(SHOWN.findall(PAGE)) >= 3
    assert len(PYTHON.findall(PAGE)) == 3
    assert CURL.findall(PAGE)
