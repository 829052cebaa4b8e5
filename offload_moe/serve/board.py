"""What the server has done and does at the moment, for metrics and the page: the engine's thread writes it."""

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FIRST_TOKEN_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True, kw_only=True)
class Running:
    """One request in the engine."""

    id: str
    num_prompt: int
    num_cached: int = 0
    num_done: int = 0
    num_generated: int = 0
    began_at: float = field(default_factory=time.monotonic)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "phase": "answer" if self.num_generated else "prompt",
            "prompt_tokens": self.num_prompt,
            "cached_tokens": self.num_cached,
            "prompt_done": self.num_prompt if self.num_generated else self.num_done,
            "generated": self.num_generated,
            "age_s": round(time.monotonic() - self.began_at, 3),
        }


@dataclass(slots=True)
class Board:
    """Running totals since the server began."""

    started_at: float = field(default_factory=time.monotonic)
    num_finished: int = 0
    num_cancelled: int = 0
    num_failed: int = 0
    num_refused: int = 0
    num_prompt_tokens: int = 0  # computed
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    first_token_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS_S))
    running: dict[str, Running] = field(default_factory=dict)

    def end(self, request: Running, how: Literal["finished", "cancelled", "failed"]) -> None:
        """A request leaves the engine."""
        self.running.pop(request.id, None)
        match how:
            case "finished":
                self.num_finished += 1
            case "cancelled":
                self.num_cancelled += 1
            case "failed":
                self.num_failed += 1
