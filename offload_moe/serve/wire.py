"""Answers as bytes and as ASGI messages: JSON, and server-sent events."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


def encode(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def sse(document: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    name = f"event: {event}\n".encode() if event is not None else b""
    return name + b"data: " + encode(document) + b"\n\n"


async def start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    """The head of a response."""
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def send_json(send: Send, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """A whole response."""
    await start(send, status, {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})})
    await send({"type": "http.response.body", "body": body})
