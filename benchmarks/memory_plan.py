"""Planned against actual peak memory on the CPU: a process per budget and context, each filled to the last token.

    python benchmarks/memory_plan.py [STORE] [--budgets 0 760MiB] [--contexts 512 2048]

Budget 0 is what is free. The last line is one JSON document; `ratio` is planned over peak.
"""

import argparse
import sys
from typing import Any

from harness import finish, run_json

from offload_moe.system.sizes import format_size, parse_size

CHILD = """
import json, random, string, sys
from offload_moe.engine.load import load
source, ram, context = sys.argv[1], int(sys.argv[2]) or None, int(sys.argv[3])
with load(source, ram=ram, context=context) as model:
    answer = 16
    letters = "".join(random.Random(0).choices(string.ascii_letters + " ", k=8 * context))  # to every expert
    ids = model.tokenizer(letters, add_special_tokens=False).input_ids[: context - answer]
    text = model.tokenizer.decode(ids)
    session = model.chat(raw=True)
    for _ in session.send(text, max_new_tokens=answer, temperature=0):
        pass
    planned, peak = model.peaks["RAM"]
    print(json.dumps({
        "planned_bytes": planned,
        "peak_bytes": peak,
        "ratio": planned / peak,
        "num_slots": model.placement.ram.num_slots,
        "num_tokens": session.last_stats.num_prompt_tokens + session.last_stats.num_decode_tokens,
        "num_slots_given_up": session.last_stats.num_slots_given_up,
        "parts": {part.name: part.num_bytes for part in model.placement.ram.fixed},
    }))
"""


def measure(source: str, ram: int, context: int) -> dict[str, Any]:
    """One process. ram: bytes, 0 for what is free."""
    return {"ram_bytes": ram, "context": context} | run_json(
        [sys.executable, "-c", CHILD, source, str(ram), str(context)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", default="demo")
    parser.add_argument("--budgets", type=parse_size, nargs="+", default=[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048])
    options = parser.parse_args()
    results = []
    for ram in options.budgets:
        for context in options.contexts:
            found = measure(options.source, ram, context)
            results.append(found)
            print(
                f"budget {format_size(ram) if ram else 'free'}, context {context}: planned "
                f"{found['planned_bytes'] / 2**20:.0f} MiB, peak {found['peak_bytes'] / 2**20:.0f} MiB, "
                f"ratio {found['ratio']:.3f}, {found['num_slots']} slots",
                file=sys.stderr,
            )
    finish({"benchmark": "memory_plan", "source": options.source, "results": results})


if __name__ == "__main__":
    main()
