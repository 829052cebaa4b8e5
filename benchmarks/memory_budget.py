"""Peak memory of a process against the budget it was given, over many tokens, at several budgets.

Usage: python benchmarks/memory_budget.py --folder SCRATCH [--config benchmarks/configs/OLMoE-1B-7B-0125.json]
           [--layers 4] [--tokens 2000] [--budgets BYTES ...] [--prompts 1900 512]

Each budget and prompt is a process of its own, which reads the prompt and writes the rest of the tokens with random
weights and hot sampling. The budget has room for a chunk of a prompt that ends where the context ends, so a prompt
that nearly fills the context is the case that was planned for; with a short one expert slots borrow the room until it
is needed. Reported: peak RSS over budget; growth from the second quarter of the answer to the last, without that of
keys and values and of slots; the least and the most slots during the answer; the page cache charged to the memory
cgroup (v1, needs root; null without). The last line of stdout is one JSON document.
"""

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from harness import (
    CGROUP,
    HERE,
    HOT_SAMPLING,
    can_limit_memory,
    finish,
    forget_cached,
    make,
    peak_rss_bytes,
    rss_bytes,
    run_json,
)

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

SAMPLES = 40  # of RSS during one answer


def charged_cache_bytes() -> int | None:
    """Page cache that the kernel counts against this process's memory cgroup."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        statistics = CGROUP / path.lstrip("/") / "memory.stat"
        if controllers == "memory" and statistics.exists():
            values = dict(pair.split() for pair in statistics.read_text().splitlines())
            return int(values["cache"])
    return None


def answer(store: str, ram: int, num_tokens: int, num_prompt: int) -> dict[str, Any]:
    """Load under the budget, speak, and say what it took. num_tokens: prompt and answer, and the planned context."""
    import torch

    from offload_moe import load
    from offload_moe.chat.prompt import stream_tokens

    torch.set_num_threads(2)
    model = load(store, ram=ram, context=num_tokens)
    model.hf.generation_config.eos_token_id = None
    model.hf.config.max_position_embeddings = max(num_tokens, model.hf.config.max_position_embeddings)
    ids = torch.arange(300, 300 + num_prompt)[None]
    num_new = num_tokens - num_prompt
    sampling = HOT_SAMPLING | {"seed": 0, "max_new_tokens": num_new}
    rss: list[tuple[int, int, int]] = []  # the token it was sampled at, and the slots there were
    began = time.perf_counter()
    with stream_tokens(model.hf, None, ids, **sampling) as tokens:
        for number, _ in enumerate(tokens):
            if number % max(1, num_new // SAMPLES) == 0:
                rss.append((rss_bytes(), number, model.engine.hierarchy.num_slots("ram")))
    seconds = time.perf_counter() - began
    quarter = len(rss) // 4
    early, late = max(rss[quarter : 2 * quarter]), max(rss[-quarter:])
    per_token = next(p.num_bytes for p in model.placement.ram.fixed if p.name == "key/value cache") / num_tokens
    slot_bytes = model.placement.ram.slot_bytes
    result = {
        "budget_bytes": ram,
        "num_prompt_tokens": num_prompt,
        "peak_rss_bytes": peak_rss_bytes(),
        "growth_bytes": late[0] - early[0] - per_token * (late[1] - early[1]) - slot_bytes * (late[2] - early[2]),
        "charged_page_cache_bytes": charged_cache_bytes(),
        "num_planned_slots": model.placement.ram.num_slots,
        "num_slots": [min(slots for *_, slots in rss), max(slots for *_, slots in rss)],
        "hit_rate": model.stats.hit_rate,
        "tokens_per_s": num_new / seconds,
    }
    model.close()
    return {**result, "peak_over_budget": result["peak_rss_bytes"] / ram}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs/OLMoE-1B-7B-0125.json")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1_100_000_000, 1_300_000_000, 1_500_000_000])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1900, 512], help="tokens of the prompt")
    parser.add_argument("--group-limit", type=int, default=8_000_000_000, help="of the cgroup that counts page cache")
    parser.add_argument("--one", help="measure this store at the first budget and prompt, in this process")
    options = parser.parse_args()
    if options.one:
        finish(answer(options.one, options.budgets[0], options.tokens, options.prompts[0]))
        return
    store = options.folder / f"{options.config.stem}-{options.layers}-layers"
    make("synthesize.py", options.config, store, "--layers", str(options.layers))
    limit = options.group_limit if can_limit_memory() else None
    results = []
    for prompt, budget in product(options.prompts, options.budgets):
        forget_cached(store)
        command = [sys.executable, __file__, "--folder", str(options.folder), "--one", str(store)]
        command += ["--tokens", str(options.tokens), "--budgets", str(budget), "--prompts", str(prompt)]
        results.append(run_json(command, memory_limit=limit))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    finish(
        {
            "benchmark": "memory_budget",
            "shape": f"{options.config.stem}, {options.layers} layers",
            "tokens": options.tokens,
            "results": results,
            "peak_over_budget": {
                str(prompt): [r["peak_over_budget"] for r in results if r["num_prompt_tokens"] == prompt]
                for prompt in options.prompts
            },
        }
    )


if __name__ == "__main__":
    main()
