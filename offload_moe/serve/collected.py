"""An answer's events put together."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offload_moe.serve.events import ChoiceEnd, Event, Finished, Logprob, Reason, TextDelta, ToolDelta, ToolStart, Usage
from offload_moe.serve.tools.tool import INPUT


@dataclass(slots=True)
class CollectedCall:
    id: str
    name: str
    arguments: str = ""

    @property
    def input(self) -> str:
        """Of a custom tool: its one text."""
        return custom_input(self.arguments)

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments as an object; what is no JSON, as a single member."""
        try:
            value = json.loads(self.arguments or "{}")
        except ValueError:
            value = None
        return value if isinstance(value, dict) else {INPUT: self.arguments}


@dataclass(slots=True)
class CollectedChoice:
    text: str = ""
    reasoning: str = ""
    calls: list[CollectedCall] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    reason: Reason = "stop"
    stop: str | None = None


@dataclass(slots=True)
class Collected:
    choices: dict[int, CollectedChoice] = field(default_factory=dict)
    usage: Usage = field(default_factory=lambda: Usage(num_prompt=0, num_cached=0, num_generated=0))

    def add(self, event: Event) -> None:
        match event:
            case TextDelta():
                choice = self._choice(event.choice)
                if event.is_reasoning:
                    choice.reasoning += event.text
                else:
                    choice.text += event.text
                choice.logprobs += event.logprobs
            case ToolStart():
                self._choice(event.choice).calls.append(CollectedCall(event.id, event.name))
            case ToolDelta():
                self._choice(event.choice).calls[event.tool].arguments += event.text
            case ChoiceEnd():
                choice = self._choice(event.choice)
                choice.reason, choice.stop = event.reason, event.stop
            case Finished():
                self.usage = event.usage

    def _choice(self, number: int) -> CollectedChoice:
        return self.choices.setdefault(number, CollectedChoice())


def custom_input(arguments: str) -> str:
    """The one text that a custom tool takes, from its arguments as JSON."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    text = value.get(INPUT) if isinstance(value, Mapping) else None
    return text if isinstance(text, str) else arguments
