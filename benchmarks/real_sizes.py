"""Models that are larger than the machine, one MoE layer at a time: true width, true number of experts.

Usage: python benchmarks/real_sizes.py SCRATCH_FOLDER NAME [NAME ...] [--whole] [--ram 8GiB] [--configs FOLDER]

For each: write a checkpoint with random weights (one MoE layer, and a dense one where the model has them; every layer
with --whole), quantize it, run a prompt and ten tokens, delete it. What is checked: peak resident memory of
`quantize` under 1.5 GB plus four experts in bf16.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from harness import HERE, finish, run_json

LIMIT_BYTES = 1_500_000_000
PROMPT_TOKENS, NEW_TOKENS = 32, 10
# name -> decoder layers to keep, of which dense
CUTS = {
    "Mixtral-8x7B-v0.1": (1, None),
    "Mixtral-8x22B-v0.1": (1, None),
    "DeepSeek-V2": (2, 1),
    "DeepSeek-V3": (2, 1),
    "Kimi-K2-Instruct": (2, 1),
    "Qwen3-235B-A22B": (1, None),
    "gpt-oss-120b": (1, None),
    "Llama-4-Scout-17B-16E-Instruct": (1, None),
    "switch-base-128": (2, None),
}


def run(*command: str) -> dict[str, Any]:
    """The JSON on the last line of a benchmark in a process of its own, which may take hours."""
    script, *arguments = command
    return run_json([sys.executable, str(HERE / script), *arguments], timeout_s=None)


def measure(name: str, scratch: Path, configs: Path, *, is_whole: bool, ram: str | None) -> dict[str, Any]:
    checkpoint, store = scratch / f"{name}-checkpoint", scratch / f"{name}-store"
    layers, dense = (None, None) if is_whole else CUTS[name]
    cut = [] if layers is None else ["--layers", str(layers)]
    cut += [] if dense is None else ["--dense-layers", str(dense)]
    try:
        began = time.perf_counter()
        config = str(configs / f"{name}.json")
        run("synthesize_checkpoint.py", config, str(checkpoint), *cut)
        synthesize_s = time.perf_counter() - began
        quantized = run("run_quantize.py", str(checkpoint), str(store))
        shutil.rmtree(checkpoint)
        limit = LIMIT_BYTES + 4 * bf16_expert_bytes(store)
        ran = run(
            "run_store.py",
            str(store),
            *("--runs", "1", "--prompt-tokens", str(PROMPT_TOKENS), "--tokens", str(NEW_TOKENS)),
            *(("--ram", ram) if ram else ()),
        )
    finally:
        for folder in (checkpoint, store):
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "layers": layers,
        "dense_layers": dense,
        "synthesize_s": synthesize_s,
        "quantize": {**quantized, "limit_bytes": limit, "is_within_limit": quantized["peak_rss_bytes"] < limit},
        "run": ran,
    }


def bf16_expert_bytes(store: Path) -> int:
    """The largest expert, two bytes a weight."""
    layers = json.loads((store / "store.json").read_text())["layers"]
    return max(sum(2 * out * inner for _, out, inner in layer["shape"]["matrices"]) for layer in layers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"a file of the configs: {', '.join(CUTS)}")
    parser.add_argument("--whole", action="store_true", help="every layer")
    parser.add_argument("--ram", help="of the run, such as 8GiB")
    parser.add_argument("--configs", type=Path, default=HERE / "configs", help="of other sizes under the same names")
    options = parser.parse_args()
    if unknown := [name for name in options.names if not options.whole and name not in CUTS]:
        parser.error(f"{unknown[0]} has no cut, only --whole")
    options.scratch.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in options.names:
        results[name] = measure(name, options.scratch, options.configs, is_whole=options.whole, ram=options.ram)
        print(name, json.dumps(results[name]), file=sys.stderr)
    finish({"benchmark": "real sizes", "is_whole": options.whole, "models": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
