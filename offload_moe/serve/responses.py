"""OpenAI's `/v1/responses`, stateless: every request carries its whole conversation."""

import secrets
import time
from collections.abc import Mapping
from typing import Any

from offload_moe.serve.delivery import Delivery
from offload_moe.serve.errors import as_mapping, invalid
from offload_moe.serve.guide import ANY_OBJECT, Grammar
from offload_moe.serve.host import Host, Loaded
from offload_moe.serve.jobs import Request
from offload_moe.serve.messages import template_messages, text_of
from offload_moe.serve.offers import schema_grammar, tool_use
from offload_moe.serve.openai_chat import template_arguments
from offload_moe.serve.prepare import prepare_chat
from offload_moe.serve.prompts import Conversation
from offload_moe.serve.responses_writer import ResponseWriter
from offload_moe.serve.sampling import settings_of
from offload_moe.serve.schemas import (
    BOOLEAN,
    CHOOSING,
    MOST_TOKENS,
    MOST_TOP_LOGPROBS,
    OBJECT,
    STOP,
    TEXT,
    array,
    either,
    integer,
    number,
    optional,
    record,
    string,
)

SCHEMA = record(
    {
        "model": TEXT,
        "input": either(TEXT, array(record({"type": optional(TEXT)}))),
        "instructions": optional(TEXT),
        **CHOOSING,
        "stop": STOP,
        "max_output_tokens": optional(integer(1, MOST_TOKENS)),
        "temperature": optional(number(0, 2)),
        "top_logprobs": optional(integer(0, MOST_TOP_LOGPROBS)),
        "tools": optional(array(record({"type": TEXT}, "type"))),
        "tool_choice": optional(either(string("none", "auto", "required"), OBJECT)),
        "parallel_tool_calls": optional(BOOLEAN),
        "text": optional(record({"format": optional(record({"type": TEXT}, "type"))})),
        "reasoning": optional(record({"effort": optional(TEXT)})),
        "store": optional(BOOLEAN),
        "background": optional(BOOLEAN),
        "previous_response_id": optional(TEXT),
        "include": optional(array(TEXT)),
        "truncation": optional(string("auto", "disabled")),
        "prompt_cache_key": optional(TEXT),
        "safety_identifier": optional(TEXT),
        "service_tier": optional(TEXT),
        "chat_template_kwargs": optional(OBJECT),
    },
    "model",
    "input",
)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def response_delivery(host: Host, document: Mapping[str, Any]) -> Delivery:
    """The answer to a checked request. Raises: ApiError."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if document.get(name):
            raise invalid(
                f"{name} is not supported: no response is stored. Send the whole conversation as input.", name
            )
    if document.get("background"):
        raise invalid("background is not supported: no response is stored.", "background")
    identity = f"resp_{secrets.token_hex(16)}"
    conversation = _conversation(host, document)
    grammar = _grammar(as_mapping(document.get("text")))
    settings = settings_of(
        document, max_tokens=document.get("max_output_tokens"), top_logprobs=document.get("top_logprobs") or None
    )

    def prepare(loaded: Loaded) -> Request:
        return prepare_chat(loaded, identity, conversation, settings, grammar=grammar)

    return Delivery(
        host,
        prepare,
        lambda request: ResponseWriter(echo(identity, host.name, document), conversation.tools.tools),
        is_streamed=bool(document.get("stream")),
    )


def echo(identity: str, model: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """The response before it has any output: the request's fields, with their defaults."""
    return {
        "id": identity,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": document.get("instructions"),
        "model": model,
        "output": [],
        "parallel_tool_calls": document.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": as_mapping(document.get("reasoning")).get("effort"), "summary": None},
        "background": False,
        "max_output_tokens": document.get("max_output_tokens"),
        "max_tool_calls": None,
        "text": {"format": as_mapping(document.get("text")).get("format") or {"type": "text"}},
        "tools": [_shown_tool(tool) for tool in document.get("tools") or ()],
        "tool_choice": document.get("tool_choice") or "auto",
        "truncation": "disabled",
        "metadata": document.get("metadata") or {},
        "temperature": _or(document.get("temperature"), 1.0),
        "top_p": _or(document.get("top_p"), 1.0),
        "top_logprobs": document.get("top_logprobs") or 0,
        "presence_penalty": _or(document.get("presence_penalty"), 0.0),
        "frequency_penalty": _or(document.get("frequency_penalty"), 0.0),
        "store": False,
        "service_tier": "default",
        "safety_identifier": document.get("safety_identifier"),
        "prompt_cache_key": document.get("prompt_cache_key"),
        "user": document.get("user"),
        "usage": None,
    }


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _shown_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"description": None, "parameters": None, "strict": False} if tool["type"] == "function" else {}
    return defaults | dict(tool)


def _conversation(host: Host, document: Mapping[str, Any]) -> Conversation:
    messages: list[dict[str, Any]] = []
    if document.get("instructions"):
        messages.append({"role": "system", "content": document["instructions"]})
    given = document["input"]
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    else:
        for index, item in enumerate(given):
            _add_item(messages, item, f"input[{index}]")
    if not any(message["role"] != "system" for message in messages) or not messages:
        raise invalid("input has no message to answer.", "input")
    effort = as_mapping(document.get("reasoning")).get("effort")
    return Conversation(
        param="input",
        messages=template_messages(messages, host.config.ignore_prefix),
        tools=tool_use(
            document.get("tools"),
            document.get("tool_choice"),
            is_parallel=document.get("parallel_tool_calls") is not False,
        ),
        arguments=template_arguments(effort if effort in EFFORTS else None, document.get("chat_template_kwargs")),
    )


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any], path: str) -> None:
    """Calls and reasoning are items of their own here, and parts of one message elsewhere."""
    match item.get("type") or "message":
        case "message":
            role = item.get("role")
            if role not in ("system", "developer", "user", "assistant"):
                raise invalid(f"{path}.role must be system, developer, user or assistant.", f"{path}.role")
            text = text_of(_content(item.get("content"), f"{path}.content"), f"{path}.content")
            if role == "assistant":
                last = _last_answer(messages)
                last["content"] = f"{last['content']}\n\n{text}" if last["content"] else text
            else:
                messages.append({"role": role, "content": text})
        case "function_call" | "custom_tool_call" as kind:
            inner, text = ("custom", "input") if kind == "custom_tool_call" else ("function", "arguments")
            named = {"name": item.get("name"), text: item.get(text)}
            call = {"id": str(item.get("call_id", "")), "type": inner, inner: named}
            _last_answer(messages).setdefault("tool_calls", []).append(call)
        case "function_call_output" | "custom_tool_call_output":
            output = text_of(_content(item.get("output"), f"{path}.output"), f"{path}.output")
            messages.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": output})
        case "reasoning":
            parts = [part for name in ("content", "summary") for part in _list(item.get(name))]
            text = "".join(str(as_mapping(part).get("text", "")) for part in parts)
            if text:
                _last_answer(messages)["reasoning_content"] = text
        case kind:
            raise invalid(f"{path} is of the type {str(kind)[:60]!r}, which is not supported.", path)


def _content(content: Any, path: str) -> Any:
    if content is None or isinstance(content, str | list):
        return content
    raise invalid(f"{path} must be a text or a list of parts.", path)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _last_answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _grammar(text: Mapping[str, Any]) -> Grammar | None:
    answer_format = as_mapping(text.get("format"))
    kind = answer_format.get("type", "text")
    if kind == "json_object":
        return Grammar(kind="json", source=ANY_OBJECT, param="text.format")
    if kind == "json_schema":
        return schema_grammar(answer_format, "text.format")
    if kind != "text":
        shown = str(kind)[:60]
        raise invalid(
            f"text.format.type is {shown!r}. It must be text, json_object or json_schema.", "text.format.type"
        )
    return None
