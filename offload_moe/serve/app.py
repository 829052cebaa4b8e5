"""`make_app`: the HTTP application of one model."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from offload_moe.engine.model import Model
from offload_moe.serve import anthropic, openai_chat, openai_completions, plain, responses
from offload_moe.serve.body import read_body
from offload_moe.serve.check import Schema, check, parse_json
from offload_moe.serve.config import ServeConfig
from offload_moe.serve.errors import ApiError, api_error
from offload_moe.serve.host import Host
from offload_moe.serve.live import live
from offload_moe.serve.metrics import metrics
from offload_moe.serve.openapi import openapi
from offload_moe.serve.security import HEALTH, Guard, api_of, path_of
from offload_moe.serve.static import page_routes
from offload_moe.serve.wire import METRICS_TYPE

Answer = Callable[[Host, Mapping[str, Any]], ASGIApp]


class App:
    """An ASGI application. It needs no lifespan: the engine's thread begins with the first request. `close` ends it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        handlers = {HTTPException: _http_error, ApiError: _error, Exception: _error}
        self._app = Guard(Starlette(routes=_routes(host), exception_handlers=cast(Any, handlers)), host.config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not self.host.is_draining:  # else the server ends without a client that does not read
                raise

    def close(self) -> None:
        """Stop what is computed and end the engine's thread. A model that was given stays open."""
        self.host.close()


def make_app(model: Model, config: ServeConfig | None = None, *, name: str | None = None) -> App:
    """The application of a loaded model, which stays the caller's.

    name: what answers call it; None takes the name of its source.

    Raises: ConfigError where the model has no tokenizer.
    """
    return App(Host(lambda: model, config or ServeConfig(), name or model_name(model.store.source), model=model))


def model_name(source: str) -> str:
    """The last part of a folder or hub id."""
    return source.rstrip("/").rpartition("/")[2] or source


def _routes(host: Host) -> list[Route]:
    routes = [
        *page_routes(),
        _get(HEALTH, lambda: JSONResponse(plain.health(host), 503 if host.state == "draining" else 200)),
        _get("/v1/models", lambda: JSONResponse(plain.models(host))),
        _get("/props", lambda: JSONResponse(plain.props(host))),
        _get("/live", lambda: JSONResponse(live(host))),
        _get("/metrics", lambda: PlainTextResponse(metrics(host), media_type=METRICS_TYPE)),
        _get("/openapi.json", lambda: JSONResponse(openapi())),
        _get("/favicon.ico", lambda: Response(status_code=204)),
        Route("/v1/models/{name:path}", _model(host), methods=["GET"]),
    ]
    answers: dict[str, tuple[Schema, Answer]] = {
        "/v1/chat/completions": (openai_chat.SCHEMA, openai_chat.chat_delivery),
        "/v1/completions": (openai_completions.SCHEMA, openai_completions.completion_delivery),
        "/v1/responses": (responses.SCHEMA, responses.response_delivery),
        "/v1/messages": (anthropic.SCHEMA, anthropic.message_delivery),
    }
    tokens: dict[str, tuple[Schema, Callable[[Host, Mapping[str, Any]], Awaitable[dict[str, Any]]]]] = {
        "/tokenize": (plain.TOKENIZE, plain.tokenize),
        "/detokenize": (plain.DETOKENIZE, plain.detokenize),
        "/v1/messages/count_tokens": (anthropic.COUNT_SCHEMA, anthropic.count_tokens),
    }
    for path, (schema, answer) in answers.items():
        routes.append(_post(path, host, schema, answer))
    for path, (schema, count) in tokens.items():
        routes.append(_post(path, host, schema, _whole(count)))
    return routes


def _get(path: str, answer: Callable[[], Response]) -> Route:
    async def endpoint(request: Request) -> Response:
        return answer()

    return Route(path, endpoint, methods=["GET"])


def _post(path: str, host: Host, schema: Schema, answer: Answer) -> Route:
    async def endpoint(request: Request) -> Response:
        document = parse_json(await read_body(request, host.config))
        check(document, schema)
        plain.check_model(host, document)
        return cast(Response, answer(host, document))

    return Route(path, endpoint, methods=["POST"])


def _whole(count: Callable[[Host, Mapping[str, Any]], Awaitable[dict[str, Any]]]) -> Answer:
    def answer(host: Host, document: Mapping[str, Any]) -> ASGIApp:
        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                response = JSONResponse(await count(host, document))
            except Exception as error:
                response = _shown(api_error(error), path_of(scope))
            await response(scope, receive, send)

        return respond

    return answer


def _model(host: Host) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        plain.check_model(host, {"model": request.path_params["name"]})
        return JSONResponse(plain.model(host))

    return endpoint


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = path_of(request.scope)
    if error.status_code == 405:
        shown = ApiError(405, f"{request.method} is not answered at {path}.")
    else:
        shown = ApiError(error.status_code, f"There is nothing at {path[:200]}.")
    return _shown(shown, path, error.headers)


async def _error(request: Request, error: Exception) -> Response:
    return _shown(api_error(error), path_of(request.scope))


def _shown(error: ApiError, path: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    document = error.document(api_of(path))
    return JSONResponse(document, error.status, headers={**(headers or {}), **error.headers})
