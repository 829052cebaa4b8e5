"""A model larger than memory: decode from disk under a memory limit, against llama.cpp's mapped file under it.

Usage: python benchmarks/disk_tier.py --folder SCRATCH [--limit 2500000000] [--trials 3] (needs root for the cgroup)

The bound is missed bytes at the disk's own rate of random direct reads of whole records, measured in the same run. The
last line of stdout is one JSON document.
"""

import argparse
import sys
from pathlib import Path

from decode_cpu import ensure_files
from harness import alternate, finish, forget_cached, paired_ratio, random_read_bytes_per_s, run_json, spread

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs/OLMoE-1B-7B-0125.json")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=2_500_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--policy", default=None)
    options = parser.parse_args()
    store, gguf = ensure_files(options.config, options.folder)
    shared = ["--threads", str(options.threads), "--tokens", str(options.tokens)]
    shared += ["--prompt-tokens", str(options.prompt_tokens)]
    # A twentieth of the limit is left to what the kernel charges beside the process's own memory.
    ours = [sys.executable, str(HERE / "run_store.py"), str(store), *shared, "--ram", str(int(options.limit * 0.95))]
    ours += ["--policy", options.policy] if options.policy else []
    commands = {
        "offload_moe": ours,
        "llama.cpp": [sys.executable, str(HERE / "peers/run_llamacpp.py"), str(gguf), *shared, "--no-repack"],
    }
    files = {"offload_moe": store, "llama.cpp": gguf}
    prompts: dict[str, list[float]] = {name: [] for name in commands}
    details: list[dict[str, float]] = []
    rates: list[float] = []

    def trial(name: str) -> float:
        forget_cached(files[name])
        result = run_json(commands[name], memory_limit=options.limit)
        last = result["runs"][-1]
        print(name, last, file=sys.stderr, flush=True)
        prompts[name].append(last["prompt_tokens_per_s"])
        if name == "offload_moe":
            rates.append(random_read_bytes_per_s(next(store.glob("experts-*")), result["slot_bytes"]))
            details.append({**last, "num_ram_slots": result["num_ram_slots"]})
        return float(last["decode_tokens_per_s"])

    decodes = alternate({name: lambda name=name: trial(name) for name in commands}, num_trials=options.trials)
    finish(
        {
            "benchmark": "disk_tier",
            "shape": options.config.stem,
            "limit_bytes": options.limit,
            "threads": options.threads,
            "decode_tokens_per_s": {name: spread(values) for name, values in decodes.items()},
            "decode_ratio_vs_llamacpp": paired_ratio(decodes, "offload_moe", "llama.cpp"),
            "prompt_ratio_vs_llamacpp": paired_ratio(prompts, "offload_moe", "llama.cpp"),
            "disk_bytes_per_s": spread(rates),
            "share_of_bound": spread(
                [d["decode_disk_bytes"] / r / d["decode_s"] for r, d in zip(rates, details, strict=True)]
            ),
            "hit_rate": spread([detail["decode_hit_rate"] for detail in details]),
            "num_ram_slots": details[-1]["num_ram_slots"],
        }
    )


if __name__ == "__main__":
    main()
