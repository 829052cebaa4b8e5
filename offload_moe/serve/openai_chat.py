"""OpenAI's `/v1/chat/completions`."""

import secrets
from collections.abc import Mapping
from functools import partial
from typing import Any

from offload_moe.serve.collected import CollectedCall, CollectedChoice, custom_input
from offload_moe.serve.config import ServeConfig
from offload_moe.serve.delivery import Delivery
from offload_moe.serve.errors import as_mapping, invalid
from offload_moe.serve.events import (
    ChoiceEnd,
    Event,
    Logprob,
    TextDelta,
    ToolDelta,
    ToolStart,
)
from offload_moe.serve.host import Host, Loaded
from offload_moe.serve.jobs import Request
from offload_moe.serve.messages import template_messages
from offload_moe.serve.offers import grammar_of, tool_use
from offload_moe.serve.openai_chunks import ChunkWriter, usage_json
from offload_moe.serve.prepare import prepare_chat
from offload_moe.serve.prompts import Conversation
from offload_moe.serve.sampling import settings_of
from offload_moe.serve.schemas import (
    BOOLEAN,
    MOST_TOKENS,
    MOST_TOP_LOGPROBS,
    NAME,
    OBJECT,
    SAMPLING,
    TEXT,
    array,
    either,
    integer,
    optional,
    record,
    string,
)
from offload_moe.serve.tools.tool import Tool

CONTENT = optional(either(TEXT, array(record({"type": TEXT}, "type"))))
MESSAGE = record(
    {
        "role": string("system", "developer", "user", "assistant", "tool", "function"),
        "content": CONTENT,
        "tool_calls": optional(array(OBJECT)),
        "tool_call_id": optional(TEXT),
        "name": optional(TEXT),
        "reasoning_content": optional(TEXT),
    },
    "role",
)
SCHEMA = record(
    {
        "model": TEXT,
        "messages": array(MESSAGE, least=1),
        **SAMPLING,
        "max_tokens": optional(integer(1, MOST_TOKENS)),
        "max_completion_tokens": optional(integer(1, MOST_TOKENS)),
        "logprobs": optional(BOOLEAN),
        "top_logprobs": optional(integer(0, MOST_TOP_LOGPROBS)),
        "tools": optional(array(record({"type": NAME}))),
        "tool_choice": optional(either(string("none", "auto", "required"), OBJECT)),
        "parallel_tool_calls": optional(BOOLEAN),
        "response_format": optional(record({"type": TEXT}, "type")),
        "reasoning_effort": optional(string("none", "minimal", "low", "medium", "high", "xhigh", "max")),
        "chat_template_kwargs": optional(OBJECT),
        "grammar": optional(TEXT),
        "json_schema": optional(OBJECT),
        "structured_outputs": optional(OBJECT),
    },
    "model",
    "messages",
)
TEMPLATE_OWN = {"messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template"}
NO_THINKING = ("none", "minimal")


def chat_delivery(host: Host, document: Mapping[str, Any]) -> Delivery:
    """The answer to a checked request. Raises: ApiError."""
    identity = f"chatcmpl-{secrets.token_hex(12)}"
    top_logprobs = (document.get("top_logprobs") or 0) if document.get("logprobs") else None
    if document.get("top_logprobs") and top_logprobs is None:
        raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
    most = document.get("max_completion_tokens") or document.get("max_tokens")
    settings = settings_of(document, max_tokens=most, top_logprobs=top_logprobs)
    conversation = conversation_of(document, host.config)
    grammar = grammar_of(document)

    def prepare(loaded: Loaded) -> Request:
        return prepare_chat(
            loaded, identity, conversation, settings, grammar=grammar, num_choices=int(document.get("n") or 1)
        )

    options = as_mapping(document.get("stream_options"))
    writer = partial(
        ChatWriter, identity, host.name, has_usage=bool(options.get("include_usage")), tools=conversation.tools.tools
    )
    return Delivery(
        host,
        prepare,
        lambda request: writer(),
        is_streamed=bool(document.get("stream")),
        shows_progress=bool(document.get("return_progress")),
    )


def conversation_of(document: Mapping[str, Any], config: ServeConfig) -> Conversation:
    """What the model is to read. Raises: ApiError."""
    tools = tool_use(
        document.get("tools"),
        document.get("tool_choice"),
        is_parallel=document.get("parallel_tool_calls") is not False,
    )
    return Conversation(
        messages=template_messages(document["messages"], config.ignore_prefix),
        tools=tools,
        arguments=template_arguments(document.get("reasoning_effort"), document.get("chat_template_kwargs")),
    )


def template_arguments(effort: str | None, more: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a template reads beside messages and tools. Raises: ApiError when a name is the server's own."""
    arguments: dict[str, Any] = {}
    if effort is not None:
        arguments = {"reasoning_effort": "low" if effort in NO_THINKING else effort}
        arguments["enable_thinking"] = arguments["thinking"] = effort not in NO_THINKING
    if taken := TEMPLATE_OWN & (more or {}).keys():
        name = min(taken)
        raise invalid(f"chat_template_kwargs.{name} is set by the server.", f"chat_template_kwargs.{name}")
    return arguments | dict(more or {})


class ChatWriter(ChunkWriter):
    """See `Writer`."""

    def __init__(self, identity: str, model: str, *, has_usage: bool, tools: tuple[Tool, ...] = ()) -> None:
        """has_usage: a stream ends with the usage."""
        super().__init__(identity, "chat.completion.chunk", model, has_usage=has_usage)
        self._id, self._model = identity, model
        self._custom = {tool.name for tool in tools if tool.is_custom}

    def write(self, event: Event) -> bytes:
        self._collected.add(event)
        match event:
            case TextDelta():
                name = "reasoning_content" if event.is_reasoning else "content"
                return self._delta(event.choice, {name: event.text}, event.logprobs)
            case ToolStart():
                call = {"index": event.tool, "id": event.id, **self._named(event.name, "")}
                return self._delta(event.choice, {"tool_calls": [call]})
            case ToolDelta():
                return self._arguments(event)
            case ChoiceEnd():
                return self._chunk([_choice(event.choice, self._role(event.choice), event.reason)])
        return super().write(event)

    def document(self) -> dict[str, Any]:
        collected = self._collected
        choices = [self._message(number, choice) for number, choice in sorted(collected.choices.items())]
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage_json(collected.usage),
            "timings": collected.usage.timings,
        }

    def _message(self, number: int, choice: CollectedChoice) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.text if choice.text or not choice.calls else None,
            "refusal": None,
            "annotations": [],
        }
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["tool_calls"] = [self._call(call) for call in choice.calls]
        logprobs = (
            {"content": [_logprob(each) for each in choice.logprobs], "refusal": None} if choice.logprobs else None
        )
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}

    def _call(self, call: CollectedCall) -> dict[str, Any]:
        is_custom = call.name in self._custom
        return {"id": call.id, **self._named(call.name, call.input if is_custom else call.arguments)}

    def _named(self, name: str, text: str) -> dict[str, Any]:
        if name in self._custom:
            return {"type": "custom", "custom": {"name": name, "input": text}}
        return {"type": "function", "function": {"name": name, "arguments": text}}

    def _arguments(self, event: ToolDelta) -> bytes:
        """Of a custom tool, its text once it is whole."""
        call = self._collected.choices[event.choice].calls[event.tool]
        if call.name not in self._custom:
            function = {"arguments": event.text}
            return self._delta(event.choice, {"tool_calls": [{"index": event.tool, "function": function}]})
        if not event.text.rstrip().endswith("}"):  # not whole yet
            return b""
        text = custom_input(call.arguments)
        if text == call.arguments:
            return b""
        return self._delta(event.choice, {"tool_calls": [{"index": event.tool, "custom": {"input": text}}]})

    def _role(self, choice: int) -> dict[str, Any]:
        """Once per choice."""
        if choice in self._begun:
            return {}
        self._begun.add(choice)
        return {"role": "assistant"}

    def _delta(self, choice: int, delta: dict[str, Any], logprobs: list[Logprob] | None = None) -> bytes:
        content = {"content": [_logprob(each) for each in logprobs], "refusal": None} if logprobs else None
        return self._chunk([_choice(choice, self._role(choice) | delta, None, content)])


def _choice(index: int, delta: dict[str, Any], reason: str | None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprob(entry: Logprob) -> dict[str, Any]:
    shown = {"token": entry.token, "logprob": entry.value, "bytes": entry.bytes}
    top = [{"token": each.token, "logprob": each.value, "bytes": each.bytes} for each in entry.top]
    return shown | {"top_logprobs": top}
