"""From the engine to a client: one response, whole or as server-sent events, cancelled when the client leaves."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from anyio import to_thread
from starlette.types import Receive, Scope, Send

from offload_moe.serve.body import client_left
from offload_moe.serve.errors import Api, ApiError, api_error, closed
from offload_moe.serve.events import Event, Failed, Finished, Progress
from offload_moe.serve.host import Host, Loaded
from offload_moe.serve.jobs import Answering, Request
from offload_moe.serve.wire import SSE_HEADERS, encode, send_json, sse, start
from offload_moe.serve.worker import Job

FIRST_S = 1.0  # how long a stream's status waits for the first event, so that an error has one


class Writer(Protocol):
    """One API's form of an answer."""

    def write(self, event: Event) -> bytes:
        """An event as a part of the stream; empty where the API has none for it."""

    def failed(self, error: ApiError) -> bytes:
        """An error in the middle of a stream."""

    def silence(self) -> bytes:
        """What keeps a connection alive."""

    def document(self) -> dict[str, Any]:
        """The whole answer, once every event was written."""


class Delivery:
    """An ASGI response."""

    def __init__(
        self,
        host: Host,
        prepare: Callable[[Loaded], Request],
        make_writer: Callable[[Request], Writer],
        *,
        is_streamed: bool,
        api: Api = "openai",
        shows_progress: bool = False,
    ) -> None:
        """prepare: renders and checks the prompt, in a thread. make_writer: called with what it returns."""
        self._host, self._prepare, self._make_writer = host, prepare, make_writer
        self._is_streamed, self._api, self._shows_progress = is_streamed, api, shows_progress
        self._began_at = time.monotonic()
        self._writer: Writer | None = None
        self._answering: Answering | None = None
        self._num_done = -1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._is_over = asyncio.Event()
        tasks = [asyncio.create_task(each) for each in (self._produce(), client_left(receive), self._deliver(send))]
        try:
            await asyncio.wait(tasks[1:], return_when=asyncio.FIRST_COMPLETED)
            error = tasks[-1].exception() if tasks[-1].done() else None
            if error is not None and not isinstance(error, OSError):  # which says that the client has left
                raise error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._answering = None  # which holds the model

    async def _produce(self) -> None:
        """Have the request computed; every error becomes an event."""
        try:
            async with self._host.use() as loaded:
                request = await to_thread.run_sync(self._prepare, loaded)
                self._writer = self._make_writer(request)
                loop, events = asyncio.get_running_loop(), self._events

                def emit(event: Event) -> None:
                    try:
                        loop.call_soon_threadsafe(events.put_nowait, event)
                    except RuntimeError:  # the loop has been closed
                        job.stop.set()

                self._answering = Answering(self._host, loaded, request, emit)
                job = Job(self._answering.work, lambda: emit(Failed(error=closed())))
                self._host.submit(job)
                try:
                    await self._is_over.wait()
                finally:
                    self._host.cancel(job)
        except Exception as error:
            self._events.put_nowait(Failed(error=error))

    async def _deliver(self, send: Send) -> None:
        await (self._stream(send) if self._is_streamed else self._whole(send))
        self._is_over.set()

    async def _whole(self, send: Send) -> None:
        while True:
            event = await self._events.get()
            if isinstance(event, Failed):
                await self._fail(send, api_error(event.error))
                return
            assert self._writer is not None
            self._writer.write(event)
            if isinstance(event, Finished):
                body = encode(self._writer.document())
                await send_json(send, 200, body)
                return

    async def _fail(self, send: Send, error: ApiError) -> None:
        await send_json(send, error.status, encode(error.document(self._api)), error.headers)

    async def _stream(self, send: Send) -> None:
        event = await self._next(FIRST_S)
        if isinstance(event, Failed):
            await self._fail(send, api_error(event.error))
            return
        await start(send, 200, SSE_HEADERS)
        while True:
            part, is_last = self._part(event)
            while not is_last and not self._events.empty():
                more, is_last = self._part(self._events.get_nowait())
                part += more
            if part:
                await send({"type": "http.response.body", "body": part, "more_body": not is_last})
            elif is_last:
                await send({"type": "http.response.body", "body": b""})
            if is_last:
                return
            event = await self._next(self._host.config.silence_s)

    async def _next(self, limit_s: float) -> Event | None:
        """None after so long a silence."""
        try:
            async with asyncio.timeout(limit_s):  # unlike `wait_for`, without a task for each token
                return await self._events.get()
        except TimeoutError:
            return None

    def _part(self, event: Event | None) -> tuple[bytes, bool]:
        writer = self._writer
        if isinstance(event, Failed):
            error = api_error(event.error)
            return (sse(error.document(self._api)) if writer is None else writer.failed(error)), True
        if event is None:
            return self._silence(writer), False
        assert writer is not None
        return writer.write(event), isinstance(event, Finished)

    def _silence(self, writer: Writer | None) -> bytes:
        if writer is None or self._answering is None:
            return b": loading\n\n" if self._host.state == "loading" else b": waiting\n\n"
        running = self._answering.running
        progress = b""
        if self._shows_progress and running.num_done != self._num_done and not running.num_generated:
            self._num_done = running.num_done
            progress = writer.write(
                Progress(
                    num_done=running.num_done,
                    num_prompt=running.num_prompt,
                    num_cached=running.num_cached,
                    elapsed_s=time.monotonic() - self._began_at,
                )
            )
        return progress or writer.silence()
