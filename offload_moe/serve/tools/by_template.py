"""Calls read by transformers' own parser, for tokenizers with a response template whose format is not in our table.

Its regions are whole before they are parsed, so arguments come at once.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from offload_moe.serve.events import Event, TextDelta, ToolDelta, ToolStart
from offload_moe.serve.tools.parser import call_id
from offload_moe.serve.tools.tool import Tool

CALLS = "tool_calls"  # the field's name in every template of transformers
REASONING = ("reasoning_content", "reasoning", "thinking")


class TemplateCalls:
    """The same as `CallParser`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Mapping[str, Tool], choice: int = 0) -> None:
        self.num_calls = 0
        self._tools, self._choice = tools, choice
        self._parser = tokenizer.get_response_parser(prefix="", tools=[tool.as_function for tool in tools.values()])
        self._held = ""  # of a region of calls
        self._has_failed = False

    def called(self, ahead: str = "") -> None:
        """Arguments are never streamed."""

    def push(self, text: str) -> list[Event]:
        if self._has_failed:
            return self._text(text)
        try:
            return self._read(self._parser.feed(text))
        except ValueError:  # a region that is no call
            return self._fail()

    def flush(self) -> list[Event]:
        if self._has_failed:
            return []
        try:
            return [*self._read(self._parser.finalize()[1]), *self._give_back()]
        except ValueError:
            return self._fail()

    def _read(self, found: Sequence[Mapping[str, Any]]) -> list[Event]:
        events: list[Event] = []
        for each in found:
            is_call = each["field"] == CALLS
            if each["type"] == "region_chunk" and is_call:
                self._held += each["text"]
            elif each["type"] == "region_chunk":
                events += self._text(each["text"], is_reasoning=each["field"] in REASONING)
            elif each["type"] == "region_close" and is_call:
                events += self._calls(each["value"])
        return events

    def _calls(self, value: Any) -> list[Event]:
        calls = [call.get("function", call) for call in (value if isinstance(value, list) else [value])]
        if not all(isinstance(call, dict) and call.get("name") in self._tools for call in calls):
            return self._give_back()
        self._held = ""
        return [event for call in calls for event in self._call(call)]

    def _call(self, call: Mapping[str, Any]) -> list[Event]:
        arguments = call.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        number = self.num_calls
        self.num_calls += 1
        start = ToolStart(choice=self._choice, tool=number, id=call_id(), name=call["name"])
        return [start, ToolDelta(choice=self._choice, tool=number, text=text)]

    def _fail(self) -> list[Event]:
        self._has_failed = True
        return self._give_back()

    def _give_back(self) -> list[Event]:
        """What is no call, as text."""
        text, self._held = self._held, ""
        return self._text(text)

    def _text(self, text: str, *, is_reasoning: bool = False) -> list[Event]:
        return [TextDelta(choice=self._choice, text=text, is_reasoning=is_reasoning)] if text else []


def can_parse(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has a response template that transformers understands."""
    try:
        tokenizer.get_response_parser(prefix="")
    except (AttributeError, ValueError, TypeError, KeyError):
        return False
    return True


def special_texts(tokenizer: PreTrainedTokenizerBase, special_tokens: Sequence[str]) -> tuple[str, ...]:
    """The special tokens that a response template reads."""
    written = json.dumps(tokenizer.response_template, ensure_ascii=False).replace("\\", "")
    return tuple(token for token in special_tokens if token in written)
