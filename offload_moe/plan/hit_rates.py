"""Expected hit rates, from replays of published routing traces through the runtime's own residency and policy.

Each curve: 2,000 tokens from a cold start, the default policy, one pool for all layers
(`offload-moe profile --replay TRACE --slots N% --pool global`, 2026-11-21). The models of the traces route to 4 of 32
and 6 of 64 experts. To apply them to another model, slots are counted in two parts: those for one top-k per layer,
the minimum for any reuse, and the share of the remaining experts that fits beside them.
Sources of the traces: gpt-oss-20b, github AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting @72b368f, Apache-2.0;
ESFT law, shape of DeepSeek-V2-Lite, github deepseek-ai/ESFT @579a771, MIT.

In the device pass the card evicts by the policy of one pass earlier, and a stepwise pass changes no slot: these curves
are from 2,000 tokens behind prompts through the passes of `offload_moe.simulate`
(`benchmarks/card_table.py --replay TRACE`, 2026-11-30).
"""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class HitCurve:
    """Hit rate as a function of the share of experts with a slot.

    points: (share of experts that have a slot, hit rate), ascending; the first has slots for one top-k per layer.
    """

    trace: str
    points: tuple[tuple[float, float], ...]

    def at(self, num_slots: int, *, num_top_k: int, num_experts: int) -> float:
        """The hit rate with `num_slots` slots for `num_experts` experts, of which a token uses `num_top_k`, 0 to 1."""
        least, at_least = self.points[0]
        if num_slots >= num_experts:
            return 1.0
        if num_slots <= num_top_k:
            return at_least * num_slots / num_top_k
        spare = (num_slots - num_top_k) / (num_experts - num_top_k)
        share = min(1.0, least + spare * (1 - least))
        (low, at_low), (high, at_high) = next(pair for pair in pairwise(self.points) if pair[1][0] >= share)
        return at_low + (at_high - at_low) * (share - low) / (high - low)


# A cold start misses every expert once, so the last replayed point is below 1; the warm value is 1.
CURVES = (
    HitCurve(
        trace="gpt-oss-20b decode",
        points=(
            (0.125, 0.529),
            (0.1875, 0.659),
            (0.25, 0.753),
            (0.375, 0.875),
            (0.5, 0.940),
            (0.625, 0.971),
            (0.75, 0.987),
            (0.875, 0.994),
            (1.0, 1.0),
        ),
    ),
    HitCurve(
        trace="ESFT law, teacher-forced",
        points=(
            (0.09375, 0.381),
            (0.125, 0.440),
            (0.1875, 0.527),
            (0.25, 0.594),
            (0.375, 0.704),
            (0.5, 0.792),
            (0.625, 0.865),
            (0.75, 0.924),
            (0.875, 0.968),
            (1.0, 1.0),
        ),
    ),
)

# Queued passes, which admit whatever they miss.
QUEUED_CURVES = (
    HitCurve(
        trace="gpt-oss-20b decode",
        points=(
            (0.125, 0.444),
            (0.1875, 0.591),
            (0.25, 0.725),
            (0.375, 0.88),
            (0.5, 0.949),
            (0.625, 0.978),
            (0.75, 0.992),
            (0.875, 0.998),
            (1.0, 1.0),
        ),
    ),
    HitCurve(
        trace="ESFT law, teacher-forced",
        points=(
            (0.09375, 0.279),
            (0.1875, 0.446),
            (0.25, 0.534),
            (0.375, 0.671),
            (0.5, 0.777),
            (0.625, 0.859),
            (0.75, 0.923),
            (0.875, 0.971),
            (1.0, 1.0),
        ),
    ),
)
# Stepwise passes, and two queued ones behind every 16.
STEPWISE_CURVES = (
    HitCurve(
        trace="gpt-oss-20b decode",
        points=(
            (0.125, 0.384),
            (0.1875, 0.551),
            (0.25, 0.678),
            (0.375, 0.837),
            (0.5, 0.922),
            (0.625, 0.966),
            (0.75, 0.989),
            (0.875, 0.997),
            (1.0, 1.0),
        ),
    ),
    HitCurve(
        trace="ESFT law, teacher-forced",
        points=(
            (0.09375, 0.177),
            (0.1875, 0.336),
            (0.25, 0.421),
            (0.375, 0.569),
            (0.5, 0.689),
            (0.625, 0.791),
            (0.75, 0.879),
            (0.875, 0.952),
            (1.0, 1.0),
        ),
    ),
)
