"""A tiny model behind the HTTP application, in this process."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from offload_moe.engine.model import Model
from offload_moe.serve.app import make_app
from offload_moe.serve.config import ServeConfig
from tests.support.chat import chat_store
from tests.support.models import open_model

URL = "http://localhost"
HELLO = [{"role": "user", "content": "Hello!"}]
SCHEMA_OF_NAMES = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 6, "maxItems": 6}},
    "required": ["names"],
    "additionalProperties": False,
}


@contextmanager
def served(model: Model, **settings: Any) -> Iterator[TestClient]:
    """A client of an application of its own."""
    app = make_app(model, ServeConfig(**settings), name="tiny")
    try:
        with TestClient(app, base_url=URL) as client:
            yield client
    finally:
        app.close()


def open_tiny(folder: Path, num_slots: int | None = None) -> Model:
    return open_model(chat_store(folder, max_position_embeddings=4096, vocab_size=280), num_slots, context=4096)


@contextmanager
def slowly(model: Model, seconds: float = 0.002) -> Iterator[None]:
    """Every forward takes longer: a tiny model answers thousands of tokens a second."""
    handle = model.hf.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


def chat(client: TestClient, messages: Any = HELLO, **fields: Any) -> Any:
    """The document of an answer, greedy and short."""
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 8} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(text: str) -> list[Any]:
    """The documents of a stream, without its comments; `[DONE]` is a string."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@contextmanager
def listening(model: Model, **settings: Any) -> Iterator[tuple[str, int]]:
    """The address of a real server, in a thread of this process."""
    app = make_app(model, ServeConfig(**settings), name="tiny")
    try:
        with running(app) as address:
            yield address
    finally:
        app.close()


@contextmanager
def running(app: Any) -> Iterator[tuple[str, int]]:
    """The address of any application, in a thread of this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
