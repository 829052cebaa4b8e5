"""The ingress before scripted replicas: what is tried again, what a client sees of a loss, and who may call."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from offload_moe.cluster.ingress import Ingress
from offload_moe.cluster.replicas import Replicas
from offload_moe.serve.config import ServeConfig
from offload_moe.serve.server import Server

KEY = "between-them"
LIMIT_S = 30
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
WAITING = b": waiting\n\n"
START = b'event: message_start\ndata: {"type":"message_start","of":"%s"}\n\n'
TOKEN = b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


class Script:
    """A replica that answers every request with the same bytes. ends: else it dies behind them, or stays silent."""

    def __init__(self, *events: bytes, status: int = 200, kind: str = "text/event-stream", ends: str = "well") -> None:
        self.events, self.status, self.kind, self.ends = events, status, kind, ends
        self.requests: list[bytes] = []
        self.has_begun, self.was_left = asyncio.Event(), asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = [line for line in head.lower().splitlines() if line.startswith(b"content-length")]
        self.requests.append(head + await reader.readexactly(int(length[0].split()[1]) if length else 0))
        writer.write(b"HTTP/1.1 %d x\r\ncontent-type: %s\r\n" % (self.status, self.kind.encode()))
        writer.write(b"retry-after: 7\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in self.events:
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
        self.has_begun.set()
        if self.ends == "silence":
            await reader.read()
            self.was_left.set()
        if self.ends == "well":
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            writer.close()
        else:
            writer.transport.abort()


class Cluster:
    """An ingress with its replicas, in one event loop."""

    def __init__(self, config: ServeConfig) -> None:
        self.replicas = Replicas(KEY)
        self.ingress = Ingress(self.replicas, config, "tiny")
        self.server = Server(self.ingress, self.ingress, drain_s=0.2)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.client = httpx2.AsyncClient(base_url=self.url, timeout=LIMIT_S, trust_env=False)
        self._servers: list[asyncio.Server] = []

    async def add(self, name: str, script: Script) -> Script:
        server = await asyncio.start_server(script.answer, "127.0.0.1", 0)
        self._servers.append(server)
        self.replicas.add(name, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        return script

    async def post(self, path: str = CHAT, **headers: str) -> httpx2.Response:
        return await self.client.post(path, json={"messages": [{"role": "user", "content": "Hi"}]}, headers=headers)

    async def serve(self) -> None:
        await self.server.serve(sockets=[self._listener])

    async def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        await self.client.aclose()
        await self.replicas.close()
        for server in self._servers:
            server.close()


@asynccontextmanager
async def cluster(*scripts: Script, **settings: Any) -> AsyncIterator[Cluster]:
    made = Cluster(ServeConfig(**settings))
    for number, script in enumerate(scripts):
        await made.add(f"r{number}", script)
    serving = asyncio.create_task(made.serve())
    while not made.server.started:
        await asyncio.sleep(0.002)
    try:
        yield made
    finally:
        await made.close()
        await serving


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await test()

    asyncio.run(limited())


def token(text: bytes) -> bytes:
    return TOKEN % text


@pytest.mark.parametrize("sent", [[WAITING], [WAITING, START % b"first"], [START % b"first", WAITING, b"data: ha"]])
def test_a_request_whose_replica_is_lost_before_the_first_token_is_tried_again(sent: list[bytes]) -> None:
    async def test() -> None:
        lost, good = Script(*sent, ends="death"), Script(START % b"second", token(b"yes"), DONE)
        async with cluster(lost, good) as each:
            response = await each.post(MESSAGES)
            events = [event for event in response.text.split("\n\n") if event and not event.startswith(":")]
            assert [event.encode() + b"\n\n" for event in events] == [START % b"second", token(b"yes"), DONE]
            assert (len(lost.requests), len(good.requests)) == (1, 1)
            assert "offload_moe_ingress_lost_total 1\n" in (await each.client.get("/metrics")).text

    run(test)


@pytest.mark.parametrize("ends", ["death", "removal"])
@pytest.mark.parametrize(("path", "kind"), [(CHAT, None), (MESSAGES, "error"), (RESPONSES, "error")])
def test_behind_the_first_token_a_loss_ends_the_stream_with_an_error(path: str, kind: str | None, ends: str) -> None:
    async def test() -> None:
        script = Script(token(b"ha"), b'data: {"ha', ends="death" if ends == "death" else "silence")
        async with cluster(script, Script(token(b"no"))) as each:
            async with each.client.stream("POST", path, json={}) as response:
                parts = aiter(response.aiter_raw())
                text = await anext(parts)
                if ends == "removal":
                    each.replicas.remove("r0")
                text += b"".join([part async for part in parts])
            first, last, rest = text.decode().split("\n\n")
            assert (first.encode() + b"\n\n", rest) == (token(b"ha"), "")
            name, _, data = last.rpartition("data: ")
            assert name == ("" if kind is None else f"event: {kind}\n")
            assert "was lost. Send the request again." in json.loads(data)["error"]["message"]

    run(test)


def test_a_whole_answer_is_tried_again_and_three_losses_are_a_502() -> None:
    async def test() -> None:
        half = Script(b'{"half":', kind="application/json", ends="death")
        whole = Script(b'{"whole": 1}', kind="application/json")
        async with cluster(half, whole) as each:
            assert (await each.post()).json() == {"whole": 1}
        async with cluster(half, half, half, whole) as each:
            response = await each.post()
            assert (response.status_code, response.json()["error"]["code"]) == (502, "replica_lost")
            assert len(whole.requests) == 1

    run(test)


def test_a_full_queue_sends_a_request_on_and_the_last_refusal_is_passed_on() -> None:
    async def test() -> None:
        full = Script(b'{"error": {"code": "queue_full"}}', status=429, kind="application/json")
        async with cluster(full, Script(token(b"yes"))) as each:
            assert (await each.post()).content == token(b"yes")
        async with cluster(full, full) as each:
            response = await each.post()
            assert (response.status_code, response.headers["retry-after"]) == (429, "7")
            assert response.json()["error"]["code"] == "queue_full"

    run(test)


def test_a_request_waits_for_a_replica_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with cluster() as each:
            assert (await each.client.get("/health")).json() == {"status": "loading", "model": "tiny", "replicas": 0}
            answering = asyncio.create_task(each.post())
            await asyncio.sleep(0.05)
            await each.add("late", Script(token(b"yes")))
            assert (await answering).content == token(b"yes")
            each.replicas.remove("late")
            monkeypatch.setattr("offload_moe.cluster.passage.NEW_S", 0.05)
            response = await each.post(MESSAGES)
            assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")

    run(test)


def test_a_replica_that_hangs_until_it_is_removed_loses_its_requests() -> None:
    async def test() -> None:
        hanging = Script(WAITING, ends="silence")
        async with cluster(hanging, Script(token(b"yes"))) as each:
            answering = asyncio.create_task(each.post())
            await hanging.has_begun.wait()
            each.replicas.remove("r0")
            assert (await answering).content.endswith(token(b"yes"))

    run(test)


def test_a_client_that_leaves_ends_its_request_at_the_replica() -> None:
    async def test() -> None:
        script = Script(token(b"ha"), ends="silence")
        async with cluster(script) as each:
            async with each.client.stream("POST", CHAT, json={}) as response:
                assert await anext(aiter(response.aiter_raw())) == token(b"ha")
            await script.was_left.wait()
            while each.replicas.router.num_running("r0"):
                await asyncio.sleep(0.002)

    run(test)


def test_the_access_rules_are_the_servers_and_the_key_is_another_one() -> None:
    async def test() -> None:
        script = Script(b"{}", kind="application/json")
        async with cluster(script, api_key="clients", max_body_bytes=200) as each:
            assert (await each.post()).status_code == 401
            assert (await each.post(authorization="Bearer clients", host="evil.example")).status_code == 403
            assert (await each.post(authorization="Bearer clients", origin="http://evil.example")).status_code == 403
            assert (await each.client.post(CHAT, content="{}", headers={"x-api-key": "clients"})).status_code == 415
            headers = {"x-api-key": "clients", "content-type": "application/json"}
            assert (await each.client.post(CHAT, content=b" " * 300, headers=headers)).status_code == 413
            assert not script.requests
            response = await each.post("/tokenize?a=b", authorization="Bearer clients", cookie="secret")
            assert (response.status_code, response.headers["x-content-type-options"]) == (200, "nosniff")
            [request] = script.requests
            assert request.startswith(b"POST /tokenize?a=b ")
            assert f"authorization: bearer {KEY}".encode() in request.lower()
            assert b"clients" not in request
            assert b"secret" not in request

    run(test)


METRICS = b'# HELP a Of a.\n# TYPE a counter\na 1\n# HELP b Of b.\n# TYPE b counter\nb{x="1"} 2\n'


def test_the_series_of_all_replicas_stand_together() -> None:
    async def test() -> None:
        async with cluster(Script(METRICS), Script(METRICS), Script(METRICS, ends="death")) as each:
            text = (await each.client.get("/metrics")).text
            assert "offload_moe_ingress_replicas 3\n" in text
            head, _, rest = text.partition("# HELP a Of a.\n")
            assert head.endswith("known_characters_total 0\n")
            assert rest.splitlines() == [
                "# TYPE a counter",
                'a{replica="r0"} 1',
                'a{replica="r1"} 1',
                "# HELP b Of b.",
                "# TYPE b counter",
                'b{replica="r0",x="1"} 2',
                'b{replica="r1",x="1"} 2',
            ]

    run(test)


def test_what_is_shown_comes_from_one_replica() -> None:
    async def test() -> None:
        scripts = [Script(b"%d" % number, kind="text/plain") for number in range(3)]
        async with cluster(*scripts) as each:
            assert [(await each.client.get("/live")).text for _ in range(4)] == ["0"] * 4
            each.replicas.remove("r0")
            assert (await each.client.get("/live")).text == "1"

    run(test)


def test_at_the_end_answers_are_waited_for_and_then_ended() -> None:
    async def test() -> None:
        script = Script(token(b"ha"), ends="silence")
        async with cluster(script) as each:
            async with each.client.stream("POST", CHAT, json={}) as response:
                parts = aiter(response.aiter_raw())
                text = await anext(parts)
                each.server.handle_exit(15, None)
                assert (await each.client.get("/health")).status_code == 503
                assert (await each.post()).json()["error"]["code"] == "shutting_down"
                text += b"".join([part async for part in parts])
            first, last, _ = text.decode().split("\n\n")
            assert first.encode() + b"\n\n" == token(b"ha")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"

    run(test)
