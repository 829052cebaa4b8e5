"""A request on its way: to a replica, to another one where that is lost before the first token, and back."""

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from offload_moe.cluster.chains import Chain
from offload_moe.cluster.opening import Opening
from offload_moe.cluster.replicas import Lost, Replicas
from offload_moe.cluster.router import Ticket
from offload_moe.serve.body import client_left
from offload_moe.serve.errors import ApiError, api_error
from offload_moe.serve.security import api_of, path_of
from offload_moe.serve.wire import encode, send_json, sse, start

logger = logging.getLogger(__name__)

MOST_LOST = 3  # replicas that one request may lose: it may be what ends them
NEW_S = 60.0  # how long a request waits for a replica where there is none
REFUSALS = (429, 503)  # a full queue, or a server that ends: another one may take the request
SENT = ("content-type", "accept", "if-none-match")
# What a connection's two ends say of themselves; the ingress has its own.
DROPPED = ("connection", "content-length", "date", "transfer-encoding", "x-content-type-options")


@dataclass(frozen=True, slots=True)
class Whole:
    """A response that is no stream."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Passage:
    """One request. num_lost: replicas that were lost while they had it. num_known: see `Ticket`."""

    def __init__(self, replicas: Replicas, scope: Scope, body: bytes, chain: Chain) -> None:
        self._replicas, self._scope, self._body, self._chain = replicas, scope, body, chain
        self._path = path_of(scope)
        self._opening = Opening()
        self._is_stream = False  # whether the head of one has gone to the client
        self._tried: set[str] = set()
        self.num_lost = self.num_known = 0
        self.num_characters = chain.length

    async def go(self, receive: Receive, send: Send) -> None:
        """Until it is answered, or the client leaves."""
        answering, leaving = asyncio.create_task(self._answer(send)), asyncio.create_task(client_left(receive))
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def fail(self, error: ApiError, send: Send) -> None:
        """In the form of the request's API: with its status, or as the last event of a stream."""
        document = error.document(api_of(self._path))
        if self._is_stream:
            await send({"type": "http.response.body", "body": self._error_event(document)})
        else:
            await send_json(send, error.status, encode(document), error.headers)

    async def _answer(self, send: Send) -> None:
        try:
            answer = await self._try_all(send)
        except Exception as error:
            await self.fail(api_error(error), send)
            return
        if answer is None:
            await send({"type": "http.response.body", "body": b""})
        elif self._is_stream:
            await send({"type": "http.response.body", "body": self._error_event(json.loads(answer.body))})
        else:
            await start(send, answer.status, {**answer.headers, "content-length": str(len(answer.body))})
            await send({"type": "http.response.body", "body": answer.body})

    async def _try_all(self, send: Send) -> Whole | None:
        """A response that is still to be sent; None behind a stream. Raises: ApiError."""
        refusal: Whole | None = None
        while (ticket := await self._take(NEW_S if refusal is None else 0)) is not None:
            self._tried.add(ticket.name)
            self.num_known = ticket.num_known
            try:
                answer = await self._replicas.run(ticket.name, self._attempt(ticket, send))
            except Lost as lost:
                logger.warning("%s", lost)
                self._lose()
                continue
            finally:
                self._replicas.router.give_back(ticket)
            if answer is None or answer.status not in REFUSALS:
                return answer
            refusal = answer
        if refusal is None:
            raise ApiError(503, "No replica has come up. Try again later.", code="no_replica", retry_after_s=10)
        return refusal

    async def _take(self, limit_s: float) -> Ticket | None:
        """What is only shown comes from the first replica, as long as there is that one."""
        without = self._tried
        if self._scope["method"] not in ("POST", "PUT"):
            left = [name for name in self._replicas.router.names if name not in self._tried]
            without = self._tried.union(left[1:])
        return await self._replicas.take(self._chain, without, limit_s)

    def _lose(self) -> None:
        self.num_lost += 1
        if self._opening.has_token:
            raise ApiError(
                502, "The replica that gave this answer was lost. Send the request again.", code="replica_lost"
            )
        if self.num_lost == MOST_LOST:
            raise ApiError(502, f"{MOST_LOST} replicas were lost while they had this request.", code="replica_lost")

    async def _attempt(self, ticket: Ticket, send: Send) -> Whole | None:
        given = Headers(scope=self._scope)
        headers = {name: given[name] for name in SENT if name in given}
        query = self._scope.get("query_string", b"").decode("latin-1")
        path = self._path + (f"?{query}" if query else "")
        async with self._replicas.request(ticket.name, self._scope["method"], path, self._body, headers) as response:
            shown = {name: value for name, value in response.headers.items() if name not in DROPPED}
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                return Whole(response.status_code, shown, await response.aread())
            if not self._is_stream:
                self._is_stream = True
                await start(send, response.status_code, shown)
            self._opening.begin()
            async for part in response.aiter_raw():
                if passed := self._opening.pass_on(part):
                    await send({"type": "http.response.body", "body": passed, "more_body": True})
        return None

    def _error_event(self, document: object) -> bytes:
        if self._path == "/v1/responses" and isinstance(document, dict):
            error = document["error"]
            shown = {name: error.get(name) for name in ("code", "message", "param")}
            return sse({"type": "error", **shown, "error": error}, "error")
        return sse(document, "error" if api_of(self._path) == "anthropic" else None)
