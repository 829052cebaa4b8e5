"""Hit rate of every policy on routing traces, framed by LRU and Belady's optimum.

    python benchmarks/policies.py TRACE.npz ... [--tokens 2000] [--slots 12.5% 25% 50%] [--policies lru knn]

The sequences of a trace are dealt in turn to two halves: settings may be chosen on the tuned half (0, 2, 4 ...),
and the held-out half (1, 3, 5 ...) is what is reported. Each half is replayed from a cold start, up to `--tokens`
tokens.
"Gap closed" is the share of the way from LRU to Belady, both with slots per layer, for the same total number of slots.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import finish

from offload_moe.errors import OffloadMoeError
from offload_moe.profile.replay import Pool, parse_slots, replay
from offload_moe.profile.trace import Trace, load_trace
from offload_moe.residency.policy import POLICY_NAMES

POOLS: tuple[Pool, ...] = ("layer", "global")
FRAME = ("lru", "belady")

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens replayed per half (default: 2000)")
    parser.add_argument("--slots", nargs="+", default=["12.5%", "25%", "50%"], help="slots in all layers together")
    parser.add_argument("--policies", nargs="+", default=list(POLICY_NAMES), choices=POLICY_NAMES)
    parser.add_argument("--pools", nargs="+", default=list(POOLS), choices=POOLS)
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    try:
        for path in options.traces:
            for half, trace in halves(load_trace(path), options.tokens).items():
                measured = measure(trace, options)
                print_table(f"{path.stem}, {half} half, {trace.num_tokens} tokens", measured, options.slots)
                rows += [{"trace": path.stem, "half": half, **row} for row in measured]
    except OffloadMoeError as error:
        sys.exit(str(error))
    finish({"benchmark": "policies", "tokens": options.tokens, "hit_rate": summary(rows), "rows": rows})


def halves(trace: Trace, num_tokens: int) -> dict[str, Trace]:
    """Every other sequence each; a trace of one sequence is all held out."""
    num_sequences = len(trace.sequence_lengths)
    if num_sequences < 2:
        return {"held-out": trace.head(num_tokens)}
    return {
        half: trace.select(range(start, num_sequences, 2)).head(num_tokens)
        for half, start in (("tuned", 0), ("held-out", 1))
    }


def measure(trace: Trace, options: argparse.Namespace) -> list[Row]:
    """Every policy, pool and size, and how much of the gap each closes."""
    pairs = {(policy, pool) for policy in options.policies for pool in options.pools}
    pairs |= {(policy, pool) for policy in FRAME for pool in POOLS}
    rows: list[Row] = []
    for slots in options.slots:
        measured = {pair: run(trace, *pair, slots) for pair in sorted(pairs)}
        lru, belady = (measured[policy, "layer"]["hit_rate"] for policy in FRAME)
        for row in measured.values():
            row["gap_closed"] = (row["hit_rate"] - lru) / (belady - lru) if belady > lru else None
        rows += measured.values()
    return rows


def run(trace: Trace, policy: str, pool: Pool, slots: str) -> Row:
    began = time.thread_time()
    result = replay(trace, policy, num_slots=parse_slots(slots, trace), pool=pool)
    acquire_us = (time.thread_time() - began) / (trace.num_tokens * trace.num_layers) * 1e6
    return {"policy": policy, "pool": pool, "slots": slots, "hit_rate": result.hit_rate, "acquire_us": acquire_us}


def print_table(title: str, rows: Sequence[Row], sizes: Sequence[str]) -> None:
    """Hit rates in percent, gap closed in brackets, ordered by the last size."""
    print(f"\n{title}\n")
    print("| policy | pool | " + " | ".join(sizes) + " |")
    print("|---" * (2 + len(sizes)) + "|")
    by_line: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_line.setdefault((row["policy"], row["pool"]), {})[row["slots"]] = row
    last = sizes[-1]
    for (policy, pool), cells in sorted(by_line.items(), key=lambda line: line[1][last]["hit_rate"]):
        print(f"| {policy} | {pool} | " + " | ".join(cell(cells[size]) for size in sizes) + " |", flush=True)


def cell(row: Row) -> str:
    closed = "" if row["gap_closed"] is None else f" ({100 * row['gap_closed']:.0f}%)"
    return f"{100 * row['hit_rate']:.1f}{closed}"


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Per policy, in its better pool: the mean hit rate over traces and sizes of the held-out halves."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["half"] == "held-out":
            found.setdefault((row["policy"], row["pool"]), []).append(row["hit_rate"])
    means = {key: sum(rates) / len(rates) for key, rates in found.items()}
    return {policy: max(mean for (name, _), mean in means.items() if name == policy) for policy, _ in sorted(means)}


if __name__ == "__main__":
    main()
