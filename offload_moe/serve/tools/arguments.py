"""The arguments of a call as JSON text, while they stream."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import regex

from offload_moe.serve.tools.parameters import names, parameter, value_of

BRACKETS = {"{": "}", "[": "]", "(": ")"}


class Reader(Protocol):
    """Takes the text behind a header. `is_over`: the arguments are complete, and `rest` follows them."""

    is_over: bool
    rest: str

    def push(self, text: str) -> str:
        """JSON text to append."""

    def flush(self) -> str:
        """JSON text to append where no more comes."""


class Enclosed:
    """Finds the end of what stands in brackets, strings in it included."""

    def __init__(self, quotes: str) -> None:
        self._quotes, self._quote, self._is_escaped = quotes, "", False
        self._open: list[str] = []

    def end(self, text: str) -> int | None:
        """Behind the bracket that closes the first one; None where it is not in this text."""
        for index, letter in enumerate(text):
            if self._quote:
                self._in_string(letter)
            elif letter in self._quotes:
                self._quote = letter
            elif letter in BRACKETS:
                self._open.append(BRACKETS[letter])
            elif self._open and letter == self._open[-1]:
                self._open.pop()
                if not self._open:
                    return index + 1
        return None

    def _in_string(self, letter: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif letter == "\\":
            self._is_escaped = True
        elif letter == self._quote:
            self._quote = ""


class JsonArguments:
    """One JSON object, passed on as it comes."""

    def __init__(self) -> None:
        self.is_over, self.rest = False, ""
        self._object = Enclosed('"')

    def push(self, text: str) -> str:
        end = self._object.end(text)
        if end is None:
            return text
        self.is_over, self.rest = True, text[end:]
        return text[:end]

    def flush(self) -> str:
        return ""


class PythonArguments:
    """Arguments up to the closing bracket, passed on once it is there."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.is_over, self.rest = False, ""
        self._names = names(schema)
        self._call = Enclosed("\"'")
        self._call.end("(")
        self._text = ""

    def push(self, text: str) -> str:
        end = self._call.end(text)
        self._text += text if end is None else text[: end - 1]
        if end is None:
            return ""
        self.is_over, self.rest = True, text[end:]
        return self.flush()

    def flush(self) -> str:
        try:
            return json.dumps(_arguments(self._text, self._names), ensure_ascii=False, allow_nan=False)
        except (SyntaxError, ValueError, TypeError, AssertionError, RecursionError):
            return json.dumps({"text": self._text}, ensure_ascii=False)


def _arguments(text: str, names: Sequence[str]) -> dict[str, Any]:
    """Raises: several errors, where the text is no list of arguments."""
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    given = [*zip(names[: len(call.args)], call.args, strict=True), *((each.arg, each.value) for each in call.keywords)]
    return {str(name): ast.literal_eval(_JsonNames().visit(value)) for name, value in given}


class _JsonNames(ast.NodeTransformer):
    """JSON's own names for Python's constants, which models mix up."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        names = {"true": True, "false": False, "null": None}
        return ast.Constant(names[node.id]) if node.id in names else node


class TaggedArguments:
    """Parameters in tags; a member of the JSON object for each one that is complete."""

    def __init__(self, pattern: str, closing: str, schema: Mapping[str, Any]) -> None:
        """pattern: of one parameter, with the groups `key` and `value`. closing: the text that ends a value."""
        self.is_over, self.rest = False, ""
        self._pattern = regex.compile(pattern, regex.DOTALL)
        self._opening = regex.compile(pattern.partition("(?P<value>")[0], regex.DOTALL)
        self._closing, self._schema = closing, schema
        self.unread = ""
        self._more: list[str] = []  # behind the text: of a long value, which is looked at once it is whole
        self._tail = ""
        self._is_in_value = False
        self._num_given = 0

    def push(self, text: str) -> str:
        self._more.append(text)
        self._tail = self._tail[-len(self._closing) :] + text
        if self._is_in_value and self._closing not in self._tail:
            return ""
        self.unread += "".join(self._more)
        self._more.clear()
        return self.read()

    def read(self) -> str:
        """The members of JSON for the parameters that are complete in `unread`, which keeps the rest."""
        given = ""
        while (match := self._pattern.match(self.unread, partial=True)) is not None:
            if match.partial:
                self._is_in_value = self._opening.match(self.unread) is not None
                self._tail = self.unread[-len(self._closing) :]
                return given
            given += self._member(match["key"].strip(), match["value"])
            self.unread = self.unread[match.end() :]
        self.is_over, self.rest = True, self.unread
        return given + self._close()

    def flush(self) -> str:
        return self._close()

    def _member(self, key: str, text: str) -> str:
        separator = ", " if self._num_given else "{"
        self._num_given += 1
        value = json.dumps(value_of(text, parameter(self._schema, key)), ensure_ascii=False)
        return f"{separator}{json.dumps(key, ensure_ascii=False)}: {value}"

    def _close(self) -> str:
        return "}" if self._num_given else "{}"
