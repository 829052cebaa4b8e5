"""Who may call: host names, origins, content types, keys and sizes, before anything is read.

A page of another site can make a browser send requests here. So the Host header must name this server (DNS rebinding),
an Origin must be this server's or allowed, and a body must be declared as JSON, which a form cannot do.
"""

import hmac
import ipaddress
import json
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offload_moe.serve.config import ServeConfig
from offload_moe.serve.errors import Api, ApiError
from offload_moe.serve.page import page_files

HEALTH = "/health"  # load balancers request it without a Host header, which every browser sends
OPEN_PATHS = frozenset({HEALTH, "/favicon.ico", *page_files()})  # need no key
LOCAL_NAME = "localhost"


class Guard:
    """Stands before the application."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app, self._config = app, config
        self._names = {LOCAL_NAME, config.host.lower(), *(name.lower() for name in config.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(path_of(scope), headers)
            self._check_origin(headers)
            if scope["method"] == "OPTIONS":
                await self._answer(send, 204, b"", self._cors(headers) | {"Allow": "GET, POST, OPTIONS"})
                return
            self._check_key(path_of(scope), headers)
            self._check_body(scope["method"], headers)
        except ApiError as error:
            document = json.dumps(error.document(api_of(path_of(scope)))).encode()
            await self._answer(send, error.status, document, error.headers | self._cors(headers))
            return
        await self._app(scope, receive, self._sending(send, self._cors(headers)))

    def _check_host(self, path: str, headers: Headers) -> None:
        if path == HEALTH and "host" not in headers:
            return
        name = host_name(headers.get("host", ""))
        if name not in self._names and not is_address(name):
            raise ApiError(
                403,
                f"The Host header names {name[:100]!r}, which is not this server. Use its address, or start it with "
                "--allow-host NAME.",
                code="unknown_host",
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self._config.cors or "*" in self._config.cors:
            return
        if origin.partition("://")[2].lower() != headers.get("host", "").lower():
            raise ApiError(
                403,
                f"Pages of {origin[:100]} may not call this server. Start it with --cors {origin[:100]}.",
                code="unknown_origin",
            )

    def _check_key(self, path: str, headers: Headers) -> None:
        key = self._config.api_key
        if key is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(
                401,
                "This server needs its API key: Authorization: Bearer KEY, or x-api-key: KEY.",
                code="invalid_api_key",
            )

    def _check_body(self, method: str, headers: Headers) -> None:
        if method not in ("POST", "PUT", "PATCH"):
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"The Content-Type is {kind[:100]!r}. It must be application/json.")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self._config.max_body_bytes:
            raise too_large(self._config)

    def _cors(self, headers: Headers) -> dict[str, str]:
        origin = headers.get("origin")
        if origin is None or (origin not in self._config.cors and "*" not in self._config.cors):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Headers": headers.get(
                "access-control-request-headers", "authorization, content-type"
            ),
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Vary": "Origin",
        }

    def _sending(self, send: Send, more: Mapping[str, str]) -> Send:
        added = [(name.lower().encode(), value.encode()) for name, value in more.items()]
        added.append((b"x-content-type-options", b"nosniff"))

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        return with_headers

    async def _answer(self, send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        all_headers = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        raw = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in all_headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def path_of(scope: Scope) -> str:
    """Below where the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) or "/"


def api_of(path: str) -> Api:
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def host_name(host: str) -> str:
    """Without its port."""
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[").lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def is_address(name: str) -> bool:
    """An address cannot be rebound to another one."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def too_large(config: ServeConfig) -> ApiError:
    return ApiError(413, f"The body is larger than {config.max_body_bytes:,} bytes.", code="request_too_large")
