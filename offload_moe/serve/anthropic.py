"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from anyio import to_thread

from offload_moe.serve.collected import Collected, CollectedChoice
from offload_moe.serve.delivery import Delivery
from offload_moe.serve.errors import ApiError, as_mapping, invalid
from offload_moe.serve.events import ChoiceEnd, Event, Finished, Reason, Started, TextDelta, ToolDelta, ToolStart, Usage
from offload_moe.serve.guide import Grammar
from offload_moe.serve.host import Host, Loaded
from offload_moe.serve.jobs import Request
from offload_moe.serve.messages import template_messages
from offload_moe.serve.offers import schema_grammar, tool_use
from offload_moe.serve.openai_chat import template_arguments
from offload_moe.serve.prepare import prepare_chat
from offload_moe.serve.prompts import Conversation
from offload_moe.serve.sampling import settings_of
from offload_moe.serve.schemas import (
    CHOOSING,
    MOST_STOPS,
    MOST_TOKENS,
    NAME,
    OBJECT,
    TEXT,
    array,
    either,
    integer,
    number,
    optional,
    record,
    string,
)
from offload_moe.serve.wire import sse

BLOCKS = array(record({"type": TEXT}, "type"))
MESSAGE = record({"role": string("user", "assistant", "system"), "content": either(TEXT, BLOCKS)}, "role", "content")
COUNTED: dict[str, Any] = {
    "model": TEXT,
    "messages": array(MESSAGE, least=1),
    "system": optional(either(TEXT, BLOCKS)),
    "tools": optional(array(record({"name": NAME, "type": optional(TEXT)}, "name"))),
    "tool_choice": optional(record({"type": string("auto", "any", "tool", "none"), "name": TEXT}, "type")),
    "thinking": optional(record({"type": TEXT}, "type")),
}
COUNT_SCHEMA = record(COUNTED, "model", "messages")
SCHEMA = record(
    {
        **COUNTED,
        **CHOOSING,
        "max_tokens": integer(1, MOST_TOKENS),
        "temperature": optional(number(0, 1)),
        "stop_sequences": optional(array(TEXT, most=MOST_STOPS)),
        "output_config": optional(OBJECT),
    },
    "model",
    "messages",
    "max_tokens",
)
STOP_REASONS: Mapping[Reason, str] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def message_delivery(host: Host, document: Mapping[str, Any]) -> Delivery:
    """The answer to a checked request. Raises: ApiError."""
    identity = f"msg_{secrets.token_hex(12)}"
    settings = settings_of({**document, "stop": document.get("stop_sequences")}, max_tokens=int(document["max_tokens"]))
    conversation = conversation_of(host, document)
    grammar = _grammar(as_mapping(document.get("output_config")))

    def prepare(loaded: Loaded) -> Request:
        return prepare_chat(loaded, identity, conversation, settings, grammar=grammar)

    return Delivery(
        host,
        prepare,
        lambda request: MessageWriter(identity, host.name),
        is_streamed=bool(document.get("stream")),
        api="anthropic",
    )


async def count_tokens(host: Host, document: Mapping[str, Any]) -> dict[str, Any]:
    """Of the prompt that the model would read. Raises: ApiError."""
    conversation = conversation_of(host, document)

    def count(loaded: Loaded) -> int:
        with loaded.lock:
            return len(loaded.prompts.render(conversation).ids)

    async with host.use() as loaded:
        return {"input_tokens": await to_thread.run_sync(count, loaded)}


def conversation_of(host: Host, document: Mapping[str, Any]) -> Conversation:
    """What the model is to read. Raises: ApiError."""
    messages: list[dict[str, Any]] = []
    if document.get("system"):
        messages.append({"role": "system", "content": _texts(document["system"], "system")})
    for index, message in enumerate(document["messages"]):
        messages += _messages(message, f"messages[{index}]")
    choice = as_mapping(document.get("tool_choice"))
    kind = choice.get("type", "auto")
    wanted = {"type": "function", "name": choice.get("name")} if kind == "tool" else kind
    thinking = as_mapping(document.get("thinking")).get("type")
    effort = as_mapping(document.get("output_config")).get("effort")
    arguments = template_arguments(effort if isinstance(effort, str) else None, None)
    if thinking is not None:
        arguments["enable_thinking"] = arguments["thinking"] = thinking != "disabled"
    return Conversation(
        messages=template_messages(messages, host.config.ignore_prefix),
        tools=tool_use(
            [_tool(tool) for tool in document.get("tools") or ()],
            wanted,
            is_parallel=not choice.get("disable_parallel_tool_use"),
        ),
        arguments=arguments,
    )


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """In OpenAI's flat form. One that runs at Anthropic has a type of its own."""
    kind = tool.get("type") or "custom"
    return {
        "type": "function" if kind in ("custom", "function") else kind,
        "name": tool["name"],
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
        "strict": tool.get("strict"),
    }


def _grammar(output: Mapping[str, Any]) -> Grammar | None:
    answer_format = as_mapping(output.get("format"))
    if answer_format.get("type") != "json_schema":
        return None
    return schema_grammar(answer_format, "output_config.format")


def _messages(message: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own elsewhere, and come before the user's text."""
    content = message["content"]
    if isinstance(content, str):
        return [{"role": message["role"], "content": content}]
    results: list[dict[str, Any]] = []
    texts, reasoning, calls = [], "", []
    for at, block in enumerate(content):
        where = f"{path}.content[{at}]"
        match block["type"]:
            case "text":
                texts.append(_text(block, where))
            case "thinking":
                reasoning += str(block.get("thinking", ""))
            case "redacted_thinking":
                pass
            case "tool_use":
                function = {"name": block.get("name"), "arguments": as_mapping(block.get("input"))}
                calls.append({"id": block.get("id", ""), "type": "function", "function": function})
            case "tool_result":
                results.append(_result(block, where))
            case kind:
                raise invalid(f"{where} is of the type {kind[:60]!r}. This model reads text only.", where)
    said: dict[str, Any] = {"role": message["role"], "content": "\n\n".join(texts)}
    if reasoning:
        said["reasoning_content"] = reasoning
    if calls:
        said["tool_calls"] = calls
    return [*results, said] if texts or calls or reasoning or not results else results


def _result(block: Mapping[str, Any], path: str) -> dict[str, Any]:
    text = _texts(block.get("content") or "", f"{path}.content")
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": text}


def _texts(content: str | Sequence[Any], path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{path} must be a text or a list of blocks.", path)
    return "\n\n".join(_text(as_mapping(block), f"{path}[{at}]") for at, block in enumerate(content))


def _text(block: Mapping[str, Any], path: str) -> str:
    if block.get("type") != "text" or not isinstance(block.get("text"), str):
        kind = str(block.get("type"))[:60]
        raise invalid(f"{path} is of the type {kind!r}. This model reads text only.", path)
    return str(block["text"])


class MessageWriter:
    """See `Writer`."""

    def __init__(self, identity: str, model: str) -> None:
        self._id, self._model = identity, model
        self._collected = Collected()
        self._num_blocks = 0
        self._open: str | None = None  # the type of the block in progress
        self._signature = secrets.token_hex(16)

    def write(self, event: Event) -> bytes:
        self._collected.add(event)
        match event:
            case Started():
                usage = Usage(num_prompt=event.num_prompt, num_cached=event.num_cached, num_generated=0)
                message = self._message([], None, None, _usage(usage))
                return _event("message_start", message=message)
            case TextDelta():
                return self._text(event)
            case ToolStart():
                return self._begin("tool_use", _tool_block(event.id, event.name, {}), is_new=True)
            case ToolDelta():
                return self._delta({"type": "input_json_delta", "partial_json": event.text})
            case ChoiceEnd():
                return self._end_block()
            case Finished():
                return self._end(event)
        return b""

    def failed(self, error: ApiError) -> bytes:
        return sse(error.document("anthropic"), "error")

    def silence(self) -> bytes:
        return _event("ping")

    def document(self) -> dict[str, Any]:
        choice = self._collected.choices.get(0, CollectedChoice())
        return self._message(self._blocks(choice), _stop_reason(choice), choice.stop, _usage(self._collected.usage))

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "stop_details": None,
            "container": None,
            "usage": usage,
        }

    def _blocks(self, choice: CollectedChoice) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = []
        if choice.reasoning:
            blocks.append({"type": "thinking", "thinking": choice.reasoning, "signature": self._signature})
        if choice.text or not (choice.calls or choice.reasoning):
            blocks.append({"type": "text", "text": choice.text, "citations": None})
        return blocks + [_tool_block(call.id, call.name, call.parsed) for call in choice.calls]

    def _text(self, event: TextDelta) -> bytes:
        if event.is_reasoning:
            begin = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            return begin + self._delta({"type": "thinking_delta", "thinking": event.text})
        begin = self._begin("text", {"type": "text", "text": ""})
        return begin + self._delta({"type": "text_delta", "text": event.text})

    def _begin(self, kind: str, block: dict[str, Any], *, is_new: bool = False) -> bytes:
        if self._open == kind and not is_new:
            return b""
        ended = self._end_block()
        self._open = kind
        return ended + _event("content_block_start", index=self._num_blocks, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._num_blocks, delta=delta)

    def _end_block(self) -> bytes:
        if self._open is None:
            return b""
        signed = b""
        if self._open == "thinking":
            signed = self._delta({"type": "signature_delta", "signature": self._signature})
        self._open = None
        self._num_blocks += 1
        return signed + _event("content_block_stop", index=self._num_blocks - 1)

    def _end(self, event: Finished) -> bytes:
        choice = self._collected.choices.get(0, CollectedChoice())
        delta = {"stop_reason": _stop_reason(choice), "stop_sequence": choice.stop}
        return _event("message_delta", delta=delta, usage=_usage(event.usage)) + _event("message_stop")


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


def _stop_reason(choice: CollectedChoice) -> str:
    return "stop_sequence" if choice.stop is not None else STOP_REASONS[choice.reason]


def _tool_block(identity: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    tool_id = f"toolu_{identity.removeprefix('call_')}"
    return {"type": "tool_use", "id": tool_id, "name": name, "input": given, "caller": {"type": "direct"}}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts kept tokens apart from those of the input."""
    return {
        "input_tokens": usage.num_prompt - usage.num_cached,
        "cache_creation": None,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached,
        "output_tokens": usage.num_generated,
        "output_tokens_details": {"thinking_tokens": usage.num_reasoning},
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
    }
