"""A client's messages and tools as a prompt: what a template cannot render is put where it can."""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offload_moe.chat.chat_template import Message, unfinished
from offload_moe.chat.template import PromptFormat
from offload_moe.errors import ConfigError
from offload_moe.serve.tools.by_template import can_parse
from offload_moe.serve.tools.formats import HERMES, CallFormat, format_of, knows_tools
from offload_moe.serve.tools.tool import ToolUse

logger = logging.getLogger(__name__)

DESCRIPTION = """You may call functions to answer. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>
For each call, write a JSON object with the function's name and its arguments within <tool_call></tool_call>:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages in the form of chat templates: role, content as a string, and for calls what templates read.

    arguments: further ones of the template, such as `enable_thinking`. param: the request's field, for errors.
    """

    messages: Sequence[Message]
    tools: ToolUse = field(default_factory=ToolUse)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    param: str = "messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A prompt. messages: as they were rendered, with the template's arguments. unfinished: an answer to continue."""

    text: str
    ids: Sequence[int]
    messages: Sequence[Message] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unfinished: str | None = None


class Prompts:
    """How one model is prompted. Where its template has no place for tools, they are described as text.

    call_format: how calls are written. has_own_parser: they are read by transformers instead.
    """

    def __init__(self, prompt_format: PromptFormat) -> None:
        self.format = prompt_format
        template = prompt_format.template
        self.knows_tools = knows_tools(template)
        found = format_of(template) if template is not None and self.knows_tools else None
        self.has_own_parser = self.knows_tools and found is None and can_parse(prompt_format.tokenizer)
        self.call_format: CallFormat = found or HERMES

    @property
    def special_ids(self) -> dict[str, int]:
        """The special tokens, by their texts."""
        return {text: token for token, text in self.format.special_tokens.items()}

    def render(self, conversation: Conversation) -> Rendered:
        """The prompt for a conversation. Raises: ConfigError when the template refuses every form of it."""
        arguments = dict(conversation.arguments)
        messages = [*conversation.messages]
        if conversation.tools.tools and self.knows_tools:
            arguments["tools"] = [tool.as_function for tool in conversation.tools.tools]
        elif not self.knows_tools:
            messages = _without_calls(messages, conversation.tools)
        messages = _merged(messages, "system")
        try:
            return self._render(messages, arguments)
        except ConfigError:
            folded = _merged(_folded(messages), "user", "assistant")
            if folded == messages:
                raise
            return self._render(folded, arguments)

    def _render(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> Rendered:
        text = self.format.render(messages, arguments=arguments)
        ids = self.format.encode(text)
        return Rendered(text=text, ids=ids, messages=messages, arguments=arguments, unfinished=unfinished(messages))

    def boundary(self, rendered: Rendered) -> int:
        """How many tokens of a prompt are certain to open the next one too."""
        if not rendered.messages:
            return len(rendered.ids) - 1
        return self.format.boundary(rendered.messages, rendered.ids, rendered.arguments)


def _without_calls(messages: Sequence[Message], tools: ToolUse) -> list[Message]:
    """Tools, calls and results as text, for a template without a place for them."""
    plain = [_plain(message) for message in messages]
    if tools.tools and not tools.is_off:
        functions = "\n".join(json.dumps(tool.as_function, ensure_ascii=False) for tool in tools.tools)
        plain.insert(0, {"role": "system", "content": DESCRIPTION.format(tools=functions)})
        if len(plain) > 1 and plain[1]["role"] == "system":  # the client's own words come first
            plain[0], plain[1] = plain[1], plain[0]
    return _merged(plain, "system", "user")


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    written = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    texts = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in written)]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return rest | {"content": "\n".join(text for text in texts if text)}


def _folded(messages: Sequence[Message]) -> list[Message]:
    """System messages as parts of the user's, for a template without them."""
    return [message | {"role": "user"} if message["role"] == "system" else message for message in messages]


def _merged(messages: Sequence[Message], *roles: str) -> list[Message]:
    """Neighbours of one of these roles as one message each."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is not None and last["role"] == message["role"] in roles and not last.get("tool_calls"):
            merged[-1] = last | message | {"content": f"{last['content']}\n\n{message['content']}"}
        else:
            merged.append(copy.copy(message))
    return merged
