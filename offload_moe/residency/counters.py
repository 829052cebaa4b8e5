"""Counters of a model: hits and misses, waits, moved bytes, tokens."""

from dataclasses import dataclass, fields


@dataclass(slots=True, kw_only=True)
class Counters:
    """Running totals. Counts are routed experts at acquire, bytes are bytes, seconds are wall-clock seconds."""

    num_hits: int = 0
    num_delayed_hits: int = 0
    num_misses: int = 0
    num_evictions: int = 0
    num_acquires: int = 0
    num_waves: int = 0
    num_prefetches: int = 0
    num_useful_prefetches: int = 0
    num_cancelled_prefetches: int = 0  # dropped as wrong before they were read
    num_computed_on_cpu: int = 0  # of the misses, with a device tier
    cpu_s: float = 0.0  # until the CPU's share of the misses was computed; the prediction
    cpu_predicted_s: float = 0.0
    link_s: float = 0.0  # until the others had been copied, in layers that were split; the prediction
    link_predicted_s: float = 0.0
    stall_s: float = 0.0
    disk_bytes: int = 0
    h2d_bytes: int = 0
    num_prompt_tokens: int = 0  # computed ones, without those found in the key/value cache
    prompt_s: float = 0.0
    num_decode_tokens: int = 0  # without the first of an answer, which counts as prompt time
    decode_s: float = 0.0  # of each answer: a pass that several share counts for each
    num_passes: int = 0  # of the decoder, behind the prompts
    num_rows: int = 0  # tokens in them, of one answer or of several, guessed ones included
    num_guesses: int = 0  # tokens that were computed before they were chosen
    num_right_guesses: int = 0
    saved_by_guesses_s: float = 0.0  # more that plain passes would have taken; negative where guesses cost more
    num_chosen_on_card: int = 0  # tokens
    num_chosen_from_logits: int = 0  # by transformers, although the card has the output head
    choice_s: float = 0.0  # that those took, behind the pass
    num_queued: int = 0  # passes of the card, and their seconds
    queued_s: float = 0.0
    num_stepwise: int = 0
    stepwise_s: float = 0.0

    @property
    def num_accesses(self) -> int:
        """Routed experts at acquire, however they were found."""
        return self.num_hits + self.num_delayed_hits + self.num_misses

    @property
    def num_absent(self) -> int:
        """Routed experts that were not resident at acquire."""
        return self.num_delayed_hits + self.num_misses

    @property
    def hit_rate(self) -> float:
        """Share of routed experts that were resident at acquire, 0 to 1; 0 before the first access."""
        return self.num_hits / self.num_accesses if self.num_accesses else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Computed prompt tokens per second; 0 before the first."""
        return self.num_prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Decoded tokens per second; 0 before the first."""
        return self.num_decode_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def rows_per_pass(self) -> float:
        """Tokens that a pass computed on average, behind the prompts; 0 before the first."""
        return self.num_rows / self.num_passes if self.num_passes else 0.0

    @property
    def guess_gain(self) -> float:
        """Decode speed over that without guesses, by the measured time of plain passes; 1 before the first."""
        return (self.decode_s + self.saved_by_guesses_s) / self.decode_s if self.decode_s else 1.0

    def copy(self) -> "Counters":
        """The present totals."""
        return Counters(**{f.name: getattr(self, f.name) for f in fields(self)})

    def plus(self, other: "Counters") -> "Counters":
        """Both together."""
        return Counters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def since(self, earlier: "Counters") -> "Counters":
        """The difference between now and an earlier copy."""
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})
