"""A tool that a client offers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INPUT = "input"  # the one argument of a custom tool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function. parameters: a JSON schema. is_strict: arguments are held to it. is_custom: takes one text."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    is_strict: bool = False
    is_custom: bool = False

    @property
    def as_function(self) -> dict[str, Any]:
        """As chat templates take it."""
        parameters = dict(self.parameters) or {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        """Of the arguments: an object, without parameters of the model's own unless the client allows them."""
        closed = {"additionalProperties": False} if "properties" in self.parameters else {}
        return {"type": "object", **closed, **self.parameters}


def custom_tool(name: str, description: str) -> Tool:
    """A tool that takes free text, as a function with one string."""
    parameters = {"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT]}
    return Tool(name=name, description=description, parameters=parameters, is_custom=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request says of tools. forced: the names of which one must be called; empty: the model decides."""

    tools: tuple[Tool, ...] = ()
    forced: tuple[str, ...] = ()
    is_off: bool = False  # tools are described, and none may be called
    is_parallel: bool = True  # several calls in one answer

    @property
    def callable(self) -> dict[str, Tool]:
        return {} if self.is_off else {tool.name: tool for tool in self.tools}


NO_TOOLS = ToolUse()
