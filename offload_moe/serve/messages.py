"""OpenAI chat messages as those of chat templates. Content is text; images and audio are refused by name."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from offload_moe.chat.chat_template import Message
from offload_moe.serve.errors import as_mapping, invalid
from offload_moe.serve.tools.tool import INPUT

ROLES = {"developer": "system", "function": "tool"}
TEXT_PARTS = ("text", "input_text", "output_text")


def template_messages(messages: Sequence[Mapping[str, Any]], ignore_prefix: str | None = None) -> list[Message]:
    """Of a checked document. ignore_prefix: a pattern removed from the beginning of the first message.

    Raises: ApiError.
    """
    read = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    _name_results(read)
    if ignore_prefix is not None and read:
        read[0]["content"] = re.sub(rf"\A(?:{ignore_prefix})", "", read[0]["content"])
    return read


def _message(message: Mapping[str, Any], path: str) -> Message:
    role = ROLES.get(message["role"], message["role"])
    read: Message = {"role": role, "content": text_of(message.get("content"), f"{path}.content")}
    if role == "assistant":
        if message.get("refusal") and not read["content"]:
            read["content"] = message["refusal"]
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(reasoning, str) and reasoning:
            read["reasoning_content"] = reasoning
        if calls := message.get("tool_calls"):
            read["tool_calls"] = [_call(call, f"{path}.tool_calls[{at}]") for at, call in enumerate(calls)]
    if role == "tool":
        read |= {name: message[name] for name in ("tool_call_id", "name") if isinstance(message.get(name), str)}
    return read


def text_of(content: Any, path: str) -> str:
    """A content that is a text, null, or a list of parts. Raises: ApiError."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(_part(part, f"{path}[{index}]") for index, part in enumerate(content))


def _part(part: Any, path: str) -> str:
    kind = as_mapping(part).get("type")
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    if isinstance(kind, str) and kind not in TEXT_PARTS:
        raise invalid(f"{path} is of the type {kind[:60]!r}. This model reads text only.", path, "unsupported_content")
    raise invalid(f"{path} is no part of text: it needs a type and a text.", path)


def _call(call: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Templates take the arguments as an object."""
    if call.get("type") == "custom":
        custom = as_mapping(call.get("custom"))
        function: Mapping[str, Any] = {"name": custom.get("name"), "arguments": {INPUT: custom.get("input", "")}}
    else:
        function = as_mapping(call.get("function"))
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        raise invalid(f"{path}.function.name is missing.", f"{path}.function.name")
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": name, "arguments": arguments if isinstance(arguments, dict) else {}},
    }


def _parsed(arguments: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {INPUT: arguments}
    return value if isinstance(value, dict) else {INPUT: value}


def _name_results(messages: Sequence[Message]) -> None:
    """Some templates write the function's name beside a result, which has its call's id alone."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and "name" not in message:
            found = names.get(message.get("tool_call_id", ""))
            if found is not None:
                message["name"] = found
