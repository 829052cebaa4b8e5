"""The default policy where it was not tuned: other orders, short traces, few large experts, many small ones.

    python benchmarks/policy_robustness.py [TRACE.npz ...] [--slots 25%]

Hit rates of LRU with slots per layer, which most others use, and of the default policy in one pool, cold. Given traces
are also replayed with their sequences backwards and cut to their first 300 tokens; synthetic ones have Zipf popularity
(`skew`) and experts kept from token to token (`reuse`). The last line of stdout is one JSON document.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from harness import finish

from offload_moe.profile.replay import parse_slots, replay
from offload_moe.profile.trace import Trace, load_trace
from offload_moe.residency.policy import DEFAULT_POLICY
from offload_moe.simulate.synthetic import synthetic_trace

SHAPES = {"top-2 of 8": (32, 8, 2), "top-4 of 32": (24, 32, 4), "top-8 of 256": (12, 256, 8)}
ROUTING = {
    "even": (0.0, 0.0),
    "Zipf": (1.0, 0.0),
    "sticky": (0.0, 0.5),
    "Zipf and sticky": (0.8, 0.4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--slots", default="25%")
    parser.add_argument("--tokens", type=int, default=1000)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, trace in cases(options.traces, options.tokens):
        num_slots = parse_slots(options.slots, trace)
        lru = replay(trace, "lru", num_slots=num_slots, pool="layer").hit_rate
        ours = replay(trace, DEFAULT_POLICY, num_slots=num_slots).hit_rate
        rows.append({"case": name, "lru_per_layer": lru, DEFAULT_POLICY: ours, "points": 100 * (ours - lru)})
        print(f"{name:45s} lru {lru:.3f}  {DEFAULT_POLICY} {ours:.3f}  {100 * (ours - lru):+.1f}", file=sys.stderr)
    finish(
        {
            "benchmark": "policy_robustness",
            "label": "simulated by replay",
            "slots": options.slots,
            "worst_points": min(row["points"] for row in rows),
            "rows": rows,
        }
    )


def cases(paths: list[Path], num_tokens: int) -> list[tuple[str, Trace]]:
    found = []
    for path in paths:
        trace = load_trace(path)
        backwards = trace.select(range(len(trace.sequence_lengths) - 1, -1, -1))
        found += [
            (f"{path.stem}, backwards", backwards.head(num_tokens)),
            (f"{path.stem}, 300 tokens", trace.head(300)),
        ]
    for shape, (num_layers, num_experts, top_k) in SHAPES.items():
        for routing, (skew, reuse) in ROUTING.items():
            trace = synthetic_trace(
                num_experts=[num_experts] * num_layers,
                top_k=top_k,
                num_tokens=num_tokens,
                skew=skew,
                reuse=reuse,
            )
            found.append((f"{shape}, {routing}", trace))
    return found


if __name__ == "__main__":
    main()
