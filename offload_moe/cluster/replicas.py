"""The replicas that an ingress reaches: their addresses, what is under way at each, and that one is lost."""

import asyncio
from collections.abc import Collection, Coroutine, Mapping
from typing import Any, TypeVar

import httpx2

from offload_moe.cluster.chains import Chain
from offload_moe.cluster.router import Router, Ticket

CONNECT_S = 5.0
Result = TypeVar("Result")


class Lost(Exception):
    """The replica died, or cannot be reached."""


class Replicas:
    """For the thread of one event loop."""

    def __init__(self, key: str) -> None:
        """key: what the replicas' servers need."""
        self.router = Router()
        self._authorization = {"Authorization": f"Bearer {key}"}
        self._urls: dict[str, str] = {}
        self._attempts: dict[str, set[asyncio.Task[Any]]] = {}
        self._came = asyncio.Event()
        # A connection for each request: closing it ends the request, and none is ever found closed by the other side.
        self._client = httpx2.AsyncClient(
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            trust_env=False,
        )

    def add(self, name: str, url: str) -> None:
        """A replica takes requests. name: never used before."""
        self._urls[name], self._attempts[name] = url, set()
        self.router.add(name)
        self._came.set()
        self._came = asyncio.Event()

    def remove(self, name: str) -> None:
        """It is lost: what is under way there ends with `Lost`."""
        self.router.remove(name)
        self._urls.pop(name, None)
        for task in self._attempts.pop(name, ()):
            task.cancel()

    async def take(self, chain: Chain, without: Collection[str], limit_s: float) -> Ticket | None:
        """See `Router.take`; waits so long for a replica to come."""
        try:
            async with asyncio.timeout(limit_s):
                while (ticket := self.router.take(chain, without)) is None:
                    await self._came.wait()
                return ticket
        except TimeoutError:
            return None

    async def run(self, name: str, work: Coroutine[Any, Any, Result]) -> Result:
        """Something that is done with a replica. Raises: Lost."""
        task = asyncio.ensure_future(work)
        attempts = self._attempts.get(name)
        if attempts is None:
            task.cancel()
        else:
            attempts.add(task)
        try:
            await asyncio.wait([task])
            return task.result()
        except (asyncio.CancelledError, httpx2.TransportError) as error:
            this = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and this is not None and this.cancelling():
                raise  # the client has left
            raise Lost(f"Replica {name} is lost: {str(error) or 'it has died'}.") from error
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if attempts is not None:
                attempts.discard(task)

    def request(
        self, name: str, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Any:
        """A context with the response of a replica's server, whose body is read in it."""
        if name not in self._urls:
            raise httpx2.ConnectError("it has died")
        return self._client.stream(
            method, self._urls[name] + path, content=body, headers={**(headers or {}), **self._authorization}
        )

    async def close(self) -> None:
        await self._client.aclose()
