"""The settings with which llama.cpp is fastest on a GGUF file: to be given to decode_cpu.py as `--peer-options`.

Usage: python benchmarks/peers/tune_llamacpp.py MODEL.gguf --native PYTHON [--threads 2] [--prompt-tokens 512]
       [--tokens 24] [--trials 3]

Flash attention, type of keys and values, batch, repacking and huge pages, each setting in a process of its own. With
one thread, CPU time counts. The last line of stdout is one JSON document.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import finish, run_json, spread
from llamacpp_builds import NATIVE, RUNNER, describe_builds

SETTINGS = (
    "--flash-attention off",
    "--flash-attention on",
    "--flash-attention off --no-repack",
    "--flash-attention off --ubatch 128",
    "--flash-attention off --huge-pages",
    "--flash-attention on --huge-pages",
    "--flash-attention off --huge-pages --keys q8_0",
    "--flash-attention off --huge-pages --keys bf16 --values bf16",
    "--flash-attention on --huge-pages --keys q8_0 --values q8_0",
)
PHASES = ("decode", "prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--native", metavar="PYTHON", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    options = parser.parse_args()
    builds = describe_builds({NATIVE: options.native})
    command = [options.native, RUNNER, str(options.model), "--threads", str(options.threads)]
    command += ["--tokens", str(options.tokens), "--prompt-tokens", str(options.prompt_tokens)]
    command += ["--context", str(options.prompt_tokens + options.tokens + 64), "--runs", str(1 + options.trials)]
    rates = {each: trial_rates([*command, *each.split()], each, options.threads) for each in options.settings}
    medians = {phase: {name: statistics.median(each[phase]) for name, each in rates.items()} for phase in PHASES}
    finish(
        {
            "benchmark": "tune_llamacpp",
            "shape": options.model.stem,
            "threads": options.threads,
            "prompt_tokens": options.prompt_tokens,
            "peers": builds,
            "tokens_per_s": {name: {phase: spread(each[phase]) for phase in PHASES} for name, each in rates.items()},
            "best": {phase: max(values, key=values.__getitem__) for phase, values in medians.items()},
        }
    )


def trial_rates(command: list[str], setting: str, threads: int) -> dict[str, list[float]]:
    """Tokens per second of every run but the first; with one thread, of CPU time."""
    runs = run_json(command, timeout_s=None)["runs"][1:]

    def rate(run: dict[str, float], phase: str) -> float:
        return 1e3 / run[f"{phase}_cpu_ms"] if threads == 1 else run[f"{phase}_tokens_per_s"]

    rates = {phase: [rate(run, phase) for run in runs] for phase in PHASES}
    print(setting, {phase: round(statistics.median(values), 2) for phase, values in rates.items()}, file=sys.stderr)
    return rates


if __name__ == "__main__":
    main()
