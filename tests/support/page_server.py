"""A server with the routes that the page uses and scripted answers, which can be killed and started again."""

import json
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from offload_moe.serve.page import PAGE_HEADERS, page_files

STEP_S = 0.02


@dataclass(kw_only=True)
class Answer:
    """What one request receives. `hold`: after the pieces, the stream stays open until this is set."""

    pieces: Sequence[str] = ("An answer.",)
    reasoning: Sequence[str] = ()
    progress: Sequence[tuple[int, int, int]] = ()  # total, cached, processed
    finish: str | None = "stop"
    error: str | None = None  # in the stream, after the pieces
    status: int = 200
    pause_s: float = 0.0
    num_bytes: int | None = None  # per write: characters and events arrive in parts
    hold: threading.Event | None = None


@dataclass
class FakeServer:
    """Listens on a port of 127.0.0.1. `answers` are used one after another, then the default one."""

    answers: list[Answer] = field(default_factory=list)
    key: str | None = None
    live: Any = None
    port: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)  # a client has closed its stream

    def __post_init__(self) -> None:
        self.state = "ok"
        self.live = self.live or Hierarchy()
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Also after `kill`, on the same port."""
        self.is_killed = threading.Event()
        self.connections: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = _Http(("127.0.0.1", self.port), handler)
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(STEP_S,))
        self._thread.start()

    def kill(self) -> None:
        """As `kill -9` does: connections end where they are."""
        self.is_killed.set()
        self._http.shutdown()
        for connection in tuple(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._http.server_close()  # joins the threads of requests
        self._thread.join()

    def next_answer(self) -> Answer:
        return self.answers.pop(0) if self.answers else Answer()


@dataclass
class Hierarchy:
    """Snapshots of a model that reads its experts from disk. Each one is a little later than the one before."""

    num_layers: int = 16
    num_experts: int = 64
    is_loaded: bool = True

    def __post_init__(self) -> None:
        self._random = random.Random(7)
        self.started_s = time.monotonic()
        self.uses = [[0.0] * self.num_experts for _ in range(self.num_layers)]
        self.tokens = 0
        self.totals = {"hits": 0, "delayed": 0, "misses": 0, "evictions": 0, "prefetches": 0, "useful_prefetches": 0}

    def snapshot(self) -> dict[str, Any]:
        new_tokens = self._random.randint(15, 22) if self.is_loaded else 0
        self.tokens += new_tokens
        for _ in range(new_tokens):
            self._step()
        return {
            "model": "demo",
            "state": "ok" if self.is_loaded else "unloaded",
            "at_s": time.monotonic(),
            "started_s": self.started_s,
            "residency": ["".join(self._tier(layer, n) for n in range(self.num_experts)) for layer in self._layers()],
            "uses": [list(self.uses[layer]) for layer in self._layers()],
            "tokens": {"prompt": 512, "cached": 128, "generated": self.tokens},
            "experts": dict(self.totals),
            "stall_s": self.totals["misses"] * 0.0011,
            "bytes": {"disk": self.totals["misses"] * 3_300_000, "h2d": self.totals["hits"] * 90_000},
            "slots": {"ram": {"slots": 512, "resident": 498, "slot_bytes": 3_300_000, **self._found()}, "vram": None},
            "memory": {
                "dense weights": 1_240_000_000,
                "expert slots in RAM": 1_690_000_000,
                "key/value caches": 268_000_000,
                "rest of the process": 410_000_000,
            },
            "budget": {"ram": 4_294_967_296, "vram": None},
            "prefixes": {"kept": 2, "tokens": 4096, "budget_tokens": 16384},
            "requests": {"running": 1, "waiting": 0, "finished": 12, "cancelled": 1, "refused": 0},
            "running": [
                {
                    "id": "chatcmpl-1",
                    "phase": "answer",
                    "prompt_tokens": 900,
                    "cached_tokens": 400,
                    "prompt_done": 900,
                    "generated": self.tokens,
                    "age_s": 1.5,
                }
            ],
        }

    def _found(self) -> dict[str, int]:
        return {name: self.totals[name] for name in ("hits", "delayed", "misses")}

    def _layers(self) -> range:
        return range(self.num_layers if self.is_loaded else 0)

    def _step(self) -> None:
        for layer in range(self.num_layers):
            for _ in range(4):
                expert = min(int(self._random.expovariate(1 / 14)), self.num_experts - 1)
                expert = (expert * 37 + layer * 11) % self.num_experts
                self.uses[layer][expert] += 1
                self.totals["hits" if self._tier(layer, expert) == "1" else "misses"] += 1

    def _tier(self, layer: int, expert: int) -> str:
        rank = (expert - layer * 11) * 45 % self.num_experts  # 37 * 45 is 1 modulo 64
        if rank < self.num_experts // 2:
            return "1"
        return "3" if (rank + layer + self.tokens) % 31 == 0 else "0"


class _Http(ThreadingHTTPServer):
    daemon_threads = False
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves is no error."""


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.0"  # a connection for each request: nothing waits for the next one

    def setup(self) -> None:
        super().setup()
        self.fake.connections.add(self.connection)

    def finish(self) -> None:
        self.fake.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        file = page_files().get(self.path.partition("?")[0])
        if file is not None:
            self._send(200, file.body, {**PAGE_HEADERS, "Content-Type": file.content_type})
        elif self.path == "/health":
            self._send_json(200, {"status": self.fake.state, "model": "demo"})
        elif not self._has_key():
            pass
        elif self.path == "/props":
            self._send_json(200, PROPS)
        elif self.path == "/live" and self.fake.live is None:
            self._send_json(500, {"error": {"message": "It failed."}})
        elif self.path == "/live":
            self._send_json(200, self.fake.live.snapshot())
        else:
            self._send(204, b"", {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._has_key():
            return
        self.fake.requests.append(body)
        answer = self.fake.next_answer()
        if answer.status != 200:
            self._send_json(
                answer.status, {"error": {"message": answer.error, "type": "x", "code": None, "param": None}}
            )
            return
        self._send(200, None, {"Content-Type": "text/event-stream"})
        try:
            for event in self._events(answer):
                size = answer.num_bytes or len(event)
                for at in range(0, len(event), size):
                    self.wfile.write(event[at : at + size])
                    self.wfile.flush()
                if answer.pause_s:
                    time.sleep(answer.pause_s)
        except OSError:
            self.fake.left.set()

    def _events(self, answer: Answer) -> Iterator[bytes]:
        for total, cached, processed in answer.progress:
            progress = {"total": total, "cache": cached, "processed": processed, "time_ms": 5}
            yield _data({"choices": [], "prompt_progress": progress})
        yield _delta({"role": "assistant"})
        for text in answer.reasoning:
            yield _delta({"reasoning_content": text})
        for text in answer.pieces:
            yield _delta({"content": text})
        while answer.hold is not None and not answer.hold.is_set() and not self.fake.is_killed.is_set():
            time.sleep(STEP_S)
            yield b": still there\n\n"
        if self.fake.is_killed.is_set() or (answer.finish is None and answer.error is None):
            return
        if answer.error is not None:
            yield _data({"error": {"message": answer.error, "type": "server_error", "code": None, "param": None}})
            return
        yield _delta({}, answer.finish)
        yield _data({"choices": [], "usage": USAGE, "timings": TIMINGS})
        yield b"data: [DONE]\n\n"

    def _has_key(self) -> bool:
        if self.fake.key is None or self.headers["Authorization"] == f"Bearer {self.fake.key}":
            return True
        self._send_json(401, {"error": {"message": "This server needs its API key.", "type": "authentication_error"}})
        return False

    def _send_json(self, status: int, document: Any) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes | None, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body or b"")


PROPS = {
    "model": "demo",
    "version": "0.1.0",
    "summary": "RAM 4.00 GiB of 15.6 GiB; 50% of 1,024 experts in RAM, dense weights in int8, room for 8,192 tokens",
    "notices": [],
    "context": 8192,
    "parallel": 1,
    "queue": 64,
    "has_chat_template": True,
    "has_tools": True,
    "has_reasoning": True,
    "sampling": {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "max_tokens": 4096},
}
USAGE = {
    "prompt_tokens": 900,
    "completion_tokens": 77,
    "total_tokens": 977,
    "prompt_tokens_details": {"cached_tokens": 400},
}
TIMINGS = {
    "prompt_n": 500,
    "cache_n": 400,
    "prompt_ms": 830.0,
    "predicted_n": 77,
    "predicted_ms": 3850.0,
    "hits": 4800,
    "misses": 120,
    "stall_ms": 132.0,
}


def _data(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def _delta(delta: dict[str, str], finish: str | None = None) -> bytes:
    return _data({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
