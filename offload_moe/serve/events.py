"""What an answer consists of while it is computed, in no API's form."""

from dataclasses import dataclass, field
from typing import Any, Literal

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One token's logarithmic probability under the model itself, before temperature and filters."""

    token: str
    value: float
    bytes: list[int]
    top: list["Logprob"] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The prompt has its place in the engine; so many of its tokens were kept from earlier."""

    num_prompt: int
    num_cached: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Prompt tokens that are done, kept ones included."""

    num_done: int
    num_prompt: int
    num_cached: int
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Text to append."""

    choice: int
    text: str
    is_reasoning: bool = False
    logprobs: list[Logprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStart:
    """A call begins; `tool` counts the calls of the choice."""

    choice: int
    tool: int
    id: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDelta:
    """JSON text to append to a call's arguments."""

    choice: int
    tool: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceEnd:
    """Why a choice ended; stop: the stop string that was found."""

    choice: int
    reason: Reason
    stop: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of all choices together; seconds; and what the experts did meanwhile."""

    num_prompt: int
    num_cached: int
    num_generated: int
    num_reasoning: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    hits: int = 0
    misses: int = 0
    stall_s: float = 0.0

    @property
    def timings(self) -> dict[str, Any]:
        return {
            "prompt_n": self.num_prompt - self.num_cached,
            "cache_n": self.num_cached,
            "prompt_ms": round(1e3 * self.prompt_s, 3),
            "predicted_n": self.num_generated,
            "predicted_ms": round(1e3 * self.decode_s, 3),
            "hits": self.hits,
            "misses": self.misses,
            "stall_ms": round(1e3 * self.stall_s, 3),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of an answer."""

    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The last event of an answer that did not come about."""

    error: BaseException


Event = Started | Progress | TextDelta | ToolStart | ToolDelta | ChoiceEnd | Finished | Failed
