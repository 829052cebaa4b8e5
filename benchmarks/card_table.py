"""Decode by the device pass on five cards and four models, simulated: it has never run on a card.

    python benchmarks/card_table.py [--cards rtx-4090 ...] [--configs FILE.json ...] [--contexts 1024 8192]
    python benchmarks/card_table.py --replay TRACE.npz ... [--tokens 2000]    # the hit rates of plan/hit_rates.py

A cell is the forecast of `offload-moe plan --gpu CARD --dense-codec int8`, the lower and the higher of two traces, with
its way (queued or stepwise), its hit rate, and the same with `--device-pass off`. Published figures of peers beside it:
other engines, other quantizations, each as its authors ran it. Last line: JSON.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import HERE, finish

from offload_moe.plan import Machine, Plan, make_plan, with_card
from offload_moe.plan.card_pass import GRAPH_NODE_BYTES
from offload_moe.profile.trace import Trace, load_trace
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import DEFAULT_POLICY
from offload_moe.simulate import DiskModel, LinkModel, PassCosts, RunCosts, VirtualPools, answers_of, simulate
from offload_moe.simulate.hardware import GPU_SHARE, LINK_SHARE
from offload_moe.system.sizes import parse_size

CARDS = ("rtx-3060", "rtx-3090", "rtx-4070-ti", "rtx-4090", "rtx-5090")
RAM = {"Qwen3-30B-A3B": "32GiB", "gpt-oss-20b": "32GiB", "Mixtral-8x7B-v0.1": "64GiB", "Qwen3-235B-A22B": "160GiB"}
DENSE_CODEC = "int8"
# tokens/s of peers as published in the threads and pages that are named.
PUBLISHED = {
    ("rtx-3060", "Qwen3-30B-A3B"): "llama.cpp with a cache of hot experts, Qwen3.6-35B-A3B instead: 51.3",
    ("rtx-3090", "Qwen3-30B-A3B"): "resident, on a 3090 Ti: 167",
    ("rtx-4070-ti", "Qwen3-30B-A3B"): "llama.cpp with a cache of hot experts: 64.5; without: 33.7",
    ("rtx-4090", "Qwen3-30B-A3B"): "resident: 196",
    ("rtx-5090", "Qwen3-30B-A3B"): "resident, imp with graphs: 287; without: 116",
    ("rtx-3090", "Mixtral-8x7B-v0.1"): "llama.cpp Q4_K_M, 28 layers on the card: 24",
}
SHARES = (0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # of the experts that have a slot
RECORD_BYTES, RATE = 1 << 20, 1e12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", default=list(CARDS))
    parser.add_argument("--configs", nargs="+", type=Path, default=[HERE / f"configs/{name}.json" for name in RAM])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192])
    parser.add_argument("--replay", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--tokens", type=int, default=2000, help="decoded tokens of each replay")
    options = parser.parse_args()
    if options.replay:
        finish({"benchmark": "card_hit_rates", "kind": "simulated", "curves": curves(options.replay, options.tokens)})
        return 0
    cells = [
        cell(card, config, context)
        for config in options.configs
        for card in options.cards
        for context in options.contexts
    ]
    finish({"benchmark": "card_table", "kind": "simulated", "inputs": inputs(), "cells": cells})
    return 0


def inputs() -> dict[str, Any]:
    """What is assumed; a card's own figures are those of `offload-moe simulate --cards`."""
    rates = Machine(ram_bytes=1).rates
    return {
        "node_s": rates.node_s,
        "graph_node_bytes": GRAPH_NODE_BYTES,
        "share_of_card_bandwidth": GPU_SHARE,
        "share_of_link": LINK_SHARE,
        "cpu_bytes_per_s": rates.ram,
        "disk_bytes_per_s": rates.disk,
        "sampling_s": rates.sampling_s,
        "step_s": rates.step_s,
        "stop_s": rates.stop_s,
        "dense_codec": DENSE_CODEC,
    }


def cell(card: str, config: Path, context: int) -> dict[str, Any]:
    """One model on one card."""
    name = config.stem
    machine = with_card(Machine(ram_bytes=parse_size(RAM.get(name, "64GiB"))), card)
    on, off = (
        make_plan(config, machine, context=context, dense_codec=DENSE_CODEC, device_pass=is_on)
        for is_on in (True, False)
    )
    found = {
        "model": name,
        "card": card,
        "context": context,
        "fits": on.fits,
        "published": PUBLISHED.get((card, name)),
        **(speeds(on, off) if on.fits else {}),
    }
    print(line(found), flush=True)
    return found


def speeds(on: Plan, off: Plan) -> dict[str, Any]:
    assert on.speed is not None
    assert on.placement.vram is not None
    return {
        "resident_share": on.placement.vram.num_slots / on.shape.num_experts,
        "forecasts": [{**asdict(each), "tokens_per_s": each.tokens_per_s} for each in on.speed.forecasts],
        "device_pass_off_tokens_per_s": off.speed.tokens_per_s if off.speed is not None else 0.0,
    }


def line(found: dict[str, Any]) -> str:
    where = f"{found['model']:18} {found['card']:12} {found['context']:6,}"
    if not found["fits"]:
        return f"{where}  does not fit"
    low, high = found["forecasts"]
    ways = " and ".join(dict.fromkeys(each["way"] for each in (low, high)))
    return (
        f"{where}  {low['tokens_per_s']:6.1f} to {high['tokens_per_s']:6.1f} tokens/s simulated, {ways}, "
        f"hits {low['hit_rate']:.0%} and {high['hit_rate']:.0%}, off {found['device_pass_off_tokens_per_s']:.1f}"
        + (f"; published: {found['published']}" if found["published"] else "")
    )


def curves(paths: list[Path], num_tokens: int) -> dict[str, dict[str, list[list[float]]]]:
    """Of each trace and mode: share of experts that have a slot, and hit rate."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for path in paths:
        trace = load_trace(path)
        least = trace.top_k / trace.num_experts
        shares = [least, *(share for share in SHARES if share > least)]
        for mode in ("queued", "stepwise"):
            points = [[share, round(hit_rate(trace, share, num_tokens, mode), 3)] for share in shares]
            found.setdefault(path.stem, {})[mode] = points
            print(f"{path.stem} {mode}: {points}", file=sys.stderr, flush=True)
    return found


def hit_rate(trace: Trace, share: float, num_tokens: int, mode: str) -> float:
    """Decoding behind the prompts of a trace, in passes whose mode is the faster one."""
    keys = ExpertKeys([trace.num_experts] * trace.num_layers)
    passes = PassCosts(fetch_s=float(mode == "stepwise"), cpu_s=float(mode == "queued"))
    pools = VirtualPools(
        keys=keys,
        slot_bytes=RECORD_BYTES,
        num_ram_slots=keys.total,
        num_device_slots=round(share * keys.total),
        policy=DEFAULT_POLICY,
    )
    return simulate(
        answers_of(trace, num_tokens=num_tokens),
        pools,
        RunCosts(has_device=True, device_pass=passes),
        DiskModel(bytes_per_s=RATE, latency_s=0.0),
        LinkModel(bytes_per_s=RATE, latency_s=0.0),
    ).hit_rate


if __name__ == "__main__":
    sys.exit(main())
