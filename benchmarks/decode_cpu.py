"""Decode and prompt speed on the CPU, everything in memory, against llama.cpp's Q4_0 on the same shape.

Usage: python benchmarks/decode_cpu.py --config benchmarks/configs/OLMoE-1B-7B-0125.json --folder SCRATCH
       [--threads 2] [--trials 5] [--prompt-tokens 512] [--tokens 32]

Both files are made in SCRATCH with random weights when they are not there yet. Processes alternate; the ratio is taken
trial by trial. The last line of stdout is one JSON document.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from harness import alternate, finish, paired_ratio, run_json, spread

HERE = Path(__file__).parent


def ensure_files(config: Path, folder: Path) -> tuple[Path, Path]:
    """The store and the GGUF file of this shape."""
    store, gguf = folder / f"{config.stem}-store", folder / f"{config.stem}.gguf"
    if not (store / "store.json").exists():
        subprocess.run([sys.executable, str(HERE / "synthesize.py"), str(config), str(store)], check=True)
    if not gguf.exists():
        part = gguf.with_suffix(".part")
        subprocess.run([sys.executable, str(HERE / "peers/make_random_gguf.py"), str(config), str(part)], check=True)
        part.rename(gguf)
    return store, gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs/OLMoE-1B-7B-0125.json")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    options = parser.parse_args()
    store, gguf = ensure_files(options.config, options.folder)
    shared = ["--threads", str(options.threads), "--tokens", str(options.tokens)]
    shared += ["--prompt-tokens", str(options.prompt_tokens)]
    commands = {
        "offload_moe": [sys.executable, str(HERE / "run_store.py"), str(store), *shared],
        "llama.cpp": [sys.executable, str(HERE / "peers/run_llamacpp.py"), str(gguf), *shared],
    }
    prompts: dict[str, list[float]] = {name: [] for name in commands}

    def trial(name: str) -> float:
        last = run_json(commands[name])["runs"][-1]
        prompts[name].append(last["prompt_tokens_per_s"])
        print(name, last, file=sys.stderr, flush=True)
        return float(last["decode_tokens_per_s"])

    decodes = alternate({name: lambda name=name: trial(name) for name in commands}, num_trials=options.trials)
    prompts = {name: values[-options.trials :] for name, values in prompts.items()}
    finish(
        {
            "benchmark": "decode_cpu",
            "shape": options.config.stem,
            "threads": options.threads,
            "prompt_tokens": options.prompt_tokens,
            "decode_tokens_per_s": {name: spread(values) for name, values in decodes.items()},
            "prompt_tokens_per_s": {name: spread(values) for name, values in prompts.items()},
            "decode_ratio_vs_llamacpp": paired_ratio(decodes, "offload_moe", "llama.cpp"),
            "prompt_ratio_vs_llamacpp": paired_ratio(prompts, "offload_moe", "llama.cpp"),
        }
    )


if __name__ == "__main__":
    main()
