"""What a client sends: a body, within limits of size and time, and at last that it has left."""

import asyncio

from starlette.requests import Request
from starlette.types import Receive

from offload_moe.serve.config import ServeConfig
from offload_moe.serve.errors import ApiError
from offload_moe.serve.security import too_large


async def read_body(request: Request, config: ServeConfig) -> bytes:
    """At most so many bytes, within so many seconds: a slow client holds a task, and nothing else.

    Raises: ApiError.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(config.body_s):
            async for part in request.stream():
                size += len(part)
                if size > config.max_body_bytes:
                    raise too_large(config)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {config.body_s:g} s.") from None
    return b"".join(parts)


async def client_left(receive: Receive) -> None:
    """Return when the connection is closed."""
    while (await receive())["type"] != "http.disconnect":
        pass
