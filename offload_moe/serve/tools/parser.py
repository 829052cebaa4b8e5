"""Calls in an answer's text, read while it streams.

A call begins for the client once the name of a tool it offered has been read. What looks like a call and is none comes
back as text.
"""

import secrets
from collections.abc import Mapping
from enum import Enum, auto
from typing import Protocol

import regex

from offload_moe.chat.reasoning import overlap
from offload_moe.serve.events import Event, TextDelta, ToolDelta, ToolStart
from offload_moe.serve.tools.arguments import JsonArguments, PythonArguments, Reader, TaggedArguments
from offload_moe.serve.tools.formats import CallFormat
from offload_moe.serve.tools.tool import Tool

Called = tuple[str, str]  # a tool, and what has been written of its arguments


class _State(Enum):
    TEXT = auto()
    HEADER = auto()
    ARGUMENTS = auto()
    END = auto()
    AFTER = auto()  # another call of the same opening, or its closing


class Parser(Protocol):
    """Turns an answer's text into events."""

    num_calls: int

    def called(self, ahead: str = "") -> Called | None:
        """The tool whose arguments are being written, or come next. ahead: text that is not pushed yet."""

    def push(self, text: str) -> list[Event]:
        """What became certain with this text."""

    def flush(self) -> list[Event]:
        """The rest, once no more text comes."""


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class CallParser:
    """Reads the formats of `FORMATS`."""

    def __init__(self, call_format: CallFormat, tools: Mapping[str, Tool], choice: int = 0) -> None:
        self.num_calls, self._begun = 0, ""
        self._format, self._tools, self._choice = call_format, tools, choice
        header = f"{call_format.header}(?={call_format.follows})"
        self._complete, self._follows, self._header, self._end, self._more, self._closing = (
            regex.compile(pattern, regex.DOTALL)
            for pattern in (
                *(call_format.header, call_format.follows, header),
                *(call_format.end, call_format.more, call_format.closing),
            )
        )
        self._name = ""
        self._state = _State.TEXT
        self._held = ""
        self._raw = ""  # the opening, in case that what follows is no call
        self._reader: Reader | None = None
        self._read = {
            _State.TEXT: self._text,
            _State.HEADER: self._read_header,
            _State.ARGUMENTS: self._read_arguments,
            _State.END: self._read_end,
            _State.AFTER: self._read_after,
        }

    def called(self, ahead: str = "") -> Called | None:
        if self._state is _State.ARGUMENTS:
            return self._name, self._begun + ahead
        text = self._held + ahead
        match = self._complete.match(text) if self._state is _State.HEADER else None
        if match is None or match.end("name") == len(text) or match["name"] not in self._tools:
            return None
        rest = text[match.end() :]
        return (match["name"], rest) if not rest or self._follows.match(rest, partial=True) else None

    def push(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        while self._read[self._state](events, False):
            pass
        return events

    def flush(self) -> list[Event]:
        events: list[Event] = []
        while self._read[self._state](events, True):
            pass
        return events

    def _text(self, events: list[Event], is_last: bool) -> bool:
        """Each reader says whether another one has to look at what is held."""
        found = [(at, opening) for opening in self._format.openings if (at := self._held.find(opening)) >= 0]
        if found and self._tools:
            at, opening = min(found)
            self._give_text(events, at)
            self._raw, self._held, self._state = opening, self._held[len(opening) :], _State.HEADER
            return True
        keep = 0
        if not is_last and self._tools:
            keep = max((overlap(self._held, opening) for opening in self._format.openings), default=0)
            if self.num_calls and not self._held[: len(self._held) - keep].strip():
                keep = len(self._held)  # blanks between calls
        self._give_text(events, len(self._held) - keep)
        return False

    def _give_text(self, events: list[Event], length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if text and not (self.num_calls and not text.strip()):
            events.append(TextDelta(choice=self._choice, text=text))

    def _read_header(self, events: list[Event], is_last: bool) -> bool:
        match = self._header.match(self._held, partial=not is_last)
        if match is not None and match.partial:
            return False
        if match is None or match["name"] not in self._tools:
            return self._no_call(events)
        name = match["name"]
        events.append(ToolStart(choice=self._choice, tool=self.num_calls, id=call_id(), name=name))
        self.num_calls += 1
        self._held = self._held[match.end() :]
        self._name = name
        self._reader = self._new_reader(self._tools[name])
        self._state = _State.ARGUMENTS
        return True

    def _new_reader(self, tool: Tool) -> Reader:
        if self._format.arguments == "json":
            return JsonArguments()
        if self._format.arguments == "python":
            return PythonArguments(tool.parameters)
        return TaggedArguments(self._format.arguments, self._format.parameter[1].strip(), tool.parameters)

    def _no_call(self, events: list[Event]) -> bool:
        """Give the opening back as text, and look at what follows it anew."""
        if not self.num_calls or self._raw.strip():
            events.append(TextDelta(choice=self._choice, text=self._raw))
        self._raw, self._state = "", _State.TEXT
        return True

    def _read_arguments(self, events: list[Event], is_last: bool) -> bool:
        reader = self._reader
        assert reader is not None
        text, self._held = self._held, ""
        self._begun += text
        given = reader.push(text)
        if is_last and not reader.is_over:
            given += reader.flush()
        if given:
            events.append(ToolDelta(choice=self._choice, tool=self.num_calls - 1, text=given))
        if reader.is_over:
            self._held, self._state, self._begun = reader.rest, _State.END, ""
        return reader.is_over

    def _read_end(self, events: list[Event], is_last: bool) -> bool:
        match = self._end.match(self._held, partial=True)
        if match is not None and match.partial:
            return self._cut_off(is_last)
        if match is not None:
            self._held = self._held[match.end() :]
        self._state = _State.AFTER
        return True

    def _cut_off(self, is_last: bool) -> bool:
        """Wait for the rest of a call's ending; where no more comes, it is no text of the answer's."""
        if is_last:
            self._held, self._state = "", _State.TEXT
        return False

    def _read_after(self, events: list[Event], is_last: bool) -> bool:
        for pattern, state in ((self._more, _State.HEADER), (self._closing, _State.TEXT)):
            match = pattern.match(self._held, partial=True)
            if match is not None and match.partial:
                return self._cut_off(is_last)
            if match is not None:
                self._raw, self._held, self._state = "", self._held[match.end() :], state
                return True
        self._state = _State.TEXT
        return True
