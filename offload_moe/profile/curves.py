"""Hit rate against cache size, by replay, and the effect of more memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from offload_moe.profile.belady import Belady
from offload_moe.profile.costs import Costs
from offload_moe.profile.replay import Pool, parse_slots, replay
from offload_moe.profile.trace import Trace
from offload_moe.residency.policy import LRU, POLICY_NAMES
from offload_moe.system.progress import Progress

Variant = tuple[str, Pool]
VARIANTS: tuple[Variant, ...] = (
    *((policy, "global") for policy in (*POLICY_NAMES, Belady.name)),
    (LRU.name, "layer"),  # the common choice elsewhere
)
SIZES = ("12.5%", "25%", "37.5%", "50%", "75%")
MORE_BYTES = 2 << 30
MOST_ACQUIRES = 20_000  # layer visits of a replay, which keeps a whole report under a minute


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The hit rate of one replay.

    pool: "global", one for all layers as in the runtime, or one per "layer".
    """

    policy: str
    pool: Pool
    num_slots: int
    share: float  # of all experts
    hit_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """The recording's own point. hit_rate: measured, of generated tokens, None if not recorded."""

    policy: str
    num_slots: int
    share: float
    hit_rate: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoreMemory:
    """Replayed with and without `more_bytes`; saved_s: per generated token, at the stall per miss that was recorded."""

    more_bytes: int
    num_slots: int
    hit_rate_now: float
    hit_rate: float
    saved_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """All replays from a cold start, the first `num_tokens` tokens one by one. Pools too small have no point."""

    num_tokens: int
    points: list[Point]
    now: Now | None
    more_memory: MoreMemory | None


def curves(trace: Trace, *, now: Now | None, slot_bytes: int | None, spent: Costs | None, progress: Progress) -> Curves:
    """Every built-in policy and the recorded one, at every size and at the recorded one.

    Raises: ConfigError where the recorded policy is none, or of an extension that is not installed.
    """
    recorded: tuple[Variant, ...] = () if now is None else ((now.policy, "global"),)
    compared = tuple(dict.fromkeys((*VARIANTS, *recorded)))
    head = trace.head(max(1, MOST_ACQUIRES // trace.num_layers))
    sizes = sorted({parse_slots(size, head) for size in SIZES} | ({now.num_slots} if now is not None else set()))
    points = []
    for number, num_slots in enumerate(sizes):
        for place, (policy, pool) in enumerate(compared):
            progress("Replaying policies", (number + place / len(compared)) / len(sizes))
            if pool == "global" or num_slots >= head.num_layers:
                points.append(_point(head, policy, num_slots, pool))
    return Curves(
        num_tokens=head.num_tokens,
        points=points,
        now=now,
        more_memory=None if now is None or not slot_bytes else _more(head, points, now, slot_bytes, spent),
    )


def curve_of(points: Sequence[Point], policy: str, pool: Pool = "global") -> list[Point]:
    return [point for point in points if (point.policy, point.pool) == (policy, pool)]


def variants(points: Sequence[Point]) -> list[Variant]:
    """The policies and pools that were compared."""
    return list(dict.fromkeys((point.policy, point.pool) for point in points))


def variant_name(policy: str, pool: Pool) -> str:
    return policy if pool == "global" else f"{policy} per {pool}"


def _point(trace: Trace, policy: str, num_slots: int, pool: Pool = "global") -> Point:
    hit_rate = replay(trace, policy, num_slots=num_slots, pool=pool).hit_rate
    share = num_slots / trace.keys.total
    return Point(policy=policy, pool=pool, num_slots=num_slots, share=share, hit_rate=hit_rate)


def _more(trace: Trace, points: Sequence[Point], now: Now, slot_bytes: int, spent: Costs | None) -> MoreMemory:
    num_all = trace.keys.total
    num_slots = min(num_all, now.num_slots + MORE_BYTES // slot_bytes)
    before = next(p.hit_rate for p in curve_of(points, now.policy) if p.num_slots == now.num_slots)
    after = _point(trace, now.policy, num_slots).hit_rate if num_slots > now.num_slots else before
    return MoreMemory(
        more_bytes=MORE_BYTES,
        num_slots=num_slots,
        hit_rate_now=before,
        hit_rate=after,
        saved_s=None if spent is None else _saved_s(spent, after - before, trace.num_layers * trace.top_k),
    )


def _saved_s(spent: Costs, gain: float, num_routed: int) -> float:
    """Seconds per token: the saved misses times the mean stall per miss."""
    fastest = spent.total.tiers[0]
    missed = (1 - fastest.hit_rate) * num_routed if fastest.hit_rate is not None else 0.0
    waited = sum(spent.time.stall_s.values())
    return min(waited, gain * num_routed * waited / missed) if missed else 0.0
