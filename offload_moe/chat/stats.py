"""The cost of one answer: tokens, seconds, and the work of the expert tiers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from offload_moe.chat.prefix import Reuse
from offload_moe.residency.counters import Counters
from offload_moe.speculate.tally import Tally

Finish = Literal["stop", "length", "context", "memory", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnStats:
    """One answer: token counts, seconds, and the counters of the expert tiers meanwhile.

    `finish` is why it ended: the model's own stop token, max_new_tokens, the end of the context, no memory for a longer
    one, or the user. `num_slots_given_up`: expert slots that made room for the context, beyond what was planned;
    `num_slots_lost`: for other programs. `crossed_window`: tokens beyond which this model rotates keys by other
    factors, where the conversation crossed that length in this turn and was computed again. `guesses`: what came of
    guessed tokens; None where none were made.
    """

    num_prompt_tokens: int
    num_reused_tokens: int
    reuse: Reuse
    prompt_s: float
    num_decode_tokens: int
    decode_s: float
    finish: Finish
    counters: Counters | None = None
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    num_slots_given_up: int = 0
    num_slots_lost: int = 0
    crossed_window: int | None = None
    guesses: Tally | None = None

    @property
    def num_computed_tokens(self) -> int:
        """Prompt tokens that were not in the cache."""
        return self.num_prompt_tokens - self.num_reused_tokens

    @property
    def time_to_first_token_s(self) -> float:
        """Seconds from the question to the first new token; 0 where none came."""
        return self.prompt_s if self.num_decode_tokens else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Computed prompt tokens per second until the first new token."""
        return self.num_computed_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens per second after the first one, which belongs to the prompt's time."""
        return (self.num_decode_tokens - 1) / self.decode_s if self.decode_s else 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of routed experts that were resident, 0 to 1; None where no expert was routed to."""
        return self.counters.hit_rate if self.counters is not None and self.counters.num_accesses else None

    @property
    def stall_s(self) -> float:
        return self.counters.stall_s if self.counters is not None else 0.0

    def add_tokens_to(self, totals: Counters) -> None:
        """Count this answer's tokens and seconds in a model's running totals."""
        totals.num_prompt_tokens += self.num_computed_tokens
        totals.prompt_s += self.prompt_s
        totals.num_decode_tokens += max(0, self.num_decode_tokens - 1)
        totals.decode_s += self.decode_s
