"""The one address of several replicas: who may call is checked here, and every route is answered by a replica.

It keeps no conversation; what it has seen only decides where a request goes.
"""

import asyncio
import threading

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from offload_moe.cluster.chains import chain_of
from offload_moe.cluster.metrics import Counts, metrics
from offload_moe.cluster.passage import Passage
from offload_moe.cluster.replicas import Replicas
from offload_moe.serve.body import read_body
from offload_moe.serve.config import ServeConfig
from offload_moe.serve.errors import ApiError, closed
from offload_moe.serve.security import HEALTH, Guard, api_of, path_of
from offload_moe.serve.wire import METRICS_TYPE, encode, send_json, start


class Ingress:
    """An ASGI application, and its end (`Ending`)."""

    def __init__(self, replicas: Replicas, config: ServeConfig, name: str) -> None:
        """name: of the model."""
        self.replicas, self.name = replicas, name
        self.counts = Counts()
        self.is_draining = False
        self._config = config
        self._guarded = Guard(self._respond, config)
        self._passing: set[asyncio.Task[None]] = set()
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self._guarded(scope, receive, send)
        except asyncio.CancelledError:
            if not self.is_draining:  # else the server ends without a client that does not read
                raise

    @property
    def state(self) -> str:
        """In the words of a server's `/health`."""
        if self.is_draining:
            return "draining"
        return "ok" if self.replicas.router.names else "loading"

    def drain(self, limit_s: float) -> bool:
        """See `Ending`."""
        self.is_draining = True
        with self._changed:
            return self._changed.wait_for(lambda: not self._passing, limit_s)

    def stop(self) -> None:
        """See `Ending`. Clients receive an error in their API's form."""
        self.is_draining = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._passing])
        self.drain(1.0)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope)
        try:
            if path == HEALTH:
                health = {"status": self.state, "model": self.name, "replicas": len(self.replicas.router.names)}
                await send_json(send, 503 if self.is_draining else 200, encode(health))
            elif path == "/metrics":
                body = (await metrics(self.replicas, self.counts)).encode()
                await start(send, 200, {"content-type": METRICS_TYPE, "content-length": str(len(body))})
                await send({"type": "http.response.body", "body": body})
            else:
                await self._pass(path, scope, receive, send)
        except ApiError as error:
            document = encode(error.document(api_of(path)))
            await send_json(send, error.status, document, error.headers)

    async def _pass(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if self.is_draining:
            raise closed()
        body = await read_body(Request(scope, receive), self._config)
        chain = await asyncio.to_thread(chain_of, path, body, self._config.ignore_prefix)  # of megabytes, at times
        passage = Passage(self.replicas, scope, body, chain)
        task = asyncio.create_task(passage.go(receive, send))
        self._passing.add(task)
        try:
            await asyncio.wait([task])
            if task.cancelled():  # by `stop`
                await passage.fail(closed(), send)
            else:
                task.result()
        finally:
            task.cancel()
            self.counts.add(passage)
            with self._changed:
                self._passing.discard(task)
                self._changed.notify_all()
