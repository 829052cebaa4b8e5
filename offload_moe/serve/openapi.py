"""The OpenAPI document: the schemas that requests are checked against, and the shape of what is answered."""

from typing import Any

import offload_moe
from offload_moe.serve import anthropic, openai_chat, openai_completions, plain, responses
from offload_moe.serve.schemas import OBJECT, TEXT, Schema, array, integer, optional, record, string

USAGE = record(
    {"prompt_tokens": integer(0), "completion_tokens": integer(0), "total_tokens": integer(0)},
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
)
ERROR = record(
    {
        "error": record(
            {"message": TEXT, "type": TEXT, "param": optional(TEXT), "code": optional(TEXT)}, "message", "type"
        )
    },
    "error",
)
ANTHROPIC_ERROR = record(
    {"type": string("error"), "error": record({"type": TEXT, "message": TEXT}, "type", "message")}, "type", "error"
)
REASON = string("stop", "length", "tool_calls")
CHAT_CHOICE = record(
    {"index": integer(0), "message": OBJECT, "finish_reason": REASON}, "index", "message", "finish_reason"
)
TEXT_CHOICE = record({"index": integer(0), "text": TEXT, "finish_reason": REASON}, "index", "text", "finish_reason")


def _completion(kind: str, choice: Schema) -> Schema:
    fields = {"id": TEXT, "object": string(kind), "model": TEXT, "choices": array(choice, least=1), "usage": USAGE}
    return record(fields, *fields)


MESSAGE = record(
    {
        "id": TEXT,
        "type": string("message"),
        "role": string("assistant"),
        "content": array(OBJECT),
        "stop_reason": string("end_turn", "max_tokens", "stop_sequence", "tool_use"),
        "usage": OBJECT,
    },
    "id",
    "type",
    "role",
    "content",
    "stop_reason",
    "usage",
)
RESPONSE = record(
    {"id": TEXT, "object": string("response"), "status": string("completed", "incomplete"), "output": array(OBJECT)},
    "id",
    "object",
    "status",
    "output",
)
POSTS: dict[str, tuple[str, Schema, Schema, bool]] = {
    "/v1/chat/completions": (
        "Answer a conversation",
        openai_chat.SCHEMA,
        _completion("chat.completion", CHAT_CHOICE),
        True,
    ),
    "/v1/completions": (
        "Continue a text",
        openai_completions.SCHEMA,
        _completion("text_completion", TEXT_CHOICE),
        True,
    ),
    "/v1/responses": ("Answer a conversation", responses.SCHEMA, RESPONSE, True),
    "/v1/messages": ("Answer a conversation", anthropic.SCHEMA, MESSAGE, True),
    "/v1/messages/count_tokens": (
        "Count a prompt's tokens",
        anthropic.COUNT_SCHEMA,
        record({"input_tokens": integer(0)}, "input_tokens"),
        False,
    ),
    "/tokenize": (
        "A text, or messages, as tokens",
        plain.TOKENIZE,
        record({"tokens": array(integer(0)), "count": integer(0)}, "tokens", "count"),
        False,
    ),
    "/detokenize": ("Tokens as a text", plain.DETOKENIZE, record({"content": TEXT}, "content"), False),
}
GETS: dict[str, tuple[str, Schema]] = {
    "/v1/models": ("The model", record({"object": string("list"), "data": array(OBJECT)}, "object", "data")),
    "/health": ("Whether requests are taken", record({"status": TEXT, "model": TEXT}, "status", "model")),
    "/props": ("What the server is", record({"model": TEXT, "version": TEXT}, "model", "version")),
    "/live": (
        "What it does at the moment",
        record({"model": TEXT, "state": TEXT, "at_s": {"type": "number"}}, "state"),
    ),
}
REFUSALS = {
    "400": "A field is not usable",
    "401": "The key is missing or wrong",
    "403": "Host or origin",
    "404": "No such model",
    "408": "The body is late",
    "413": "The body is too large",
    "415": "Not JSON",
    "429": "The queue is full",
    "503": "The server ends",
}


def openapi() -> dict[str, Any]:
    paths: dict[str, Any] = {path: {"post": _post(path, *post)} for path, post in POSTS.items()}
    paths |= {path: {"get": _get(*get)} for path, get in GETS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "offload-moe", "version": offload_moe.__version__},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _post(path: str, summary: str, schema: Schema, answer: Schema, has_stream: bool) -> dict[str, Any]:
    error = ANTHROPIC_ERROR if path.startswith("/v1/messages") else ERROR
    content: dict[str, Any] = _json(answer)
    if has_stream:
        content["text/event-stream"] = {"schema": {}}
    refusals = {status: {"description": text, "content": _json(error)} for status, text in REFUSALS.items()}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(schema)},
        "responses": {"200": {"description": "The answer", "content": content}, **refusals},
    }


def _get(summary: str, answer: Schema) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": summary, "content": _json(answer)}}}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
