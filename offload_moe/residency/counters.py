"""Counters of a model: what was hit, what was waited for, what was moved, and how many tokens came of it."""

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
    num_cancelled_prefetches: int = 0  # found wrong before they were read
    num_computed_on_cpu: int = 0  # of the misses, with a device tier
    cpu_s: float = 0.0  # until the CPU's share of the misses was computed, and what was predicted
    cpu_predicted_s: float = 0.0
    link_s: float = 0.0  # until the others had been copied, in layers that were split, and what was predicted
    link_predicted_s: float = 0.0
    stall_s: float = 0.0
    disk_bytes: int = 0
    h2d_bytes: int = 0
    num_prompt_tokens: int = 0  # computed ones, not those found in the key/value cache
    prompt_s: float = 0.0
    num_decode_tokens: int = 0  # after the first of an answer, which belongs to the prompt's time
    decode_s: float = 0.0

    @property
    def num_accesses(self) -> int:
        return self.num_hits + self.num_delayed_hits + self.num_misses

    @property
    def hit_rate(self) -> float:
        """Share of routed experts that were resident at acquire, 0 to 1; 0 before the first access."""
        return self.num_hits / self.num_accesses if self.num_accesses else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.num_prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.num_decode_tokens / self.decode_s if self.decode_s else 0.0

    def copy(self) -> "Counters":
        return Counters(**{f.name: getattr(self, f.name) for f in fields(self)})

    def plus(self, other: "Counters") -> "Counters":
        """Both together."""
        return Counters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def since(self, earlier: "Counters") -> "Counters":
        """What happened between an earlier copy and now."""
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})
