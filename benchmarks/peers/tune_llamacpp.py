"""The settings with which llama.cpp is fastest on a GGUF file: to be given to decode_cpu.py as `--peer-options`.

Usage: python benchmarks/peers/tune_llamacpp.py MODEL.gguf --native PYTHON [--threads 2] [--prompt-tokens 512]
       [--tokens 24] [--trials 3]

Flash attention, type of keys and values, batch, repacking and huge pages, each setting in a process of its own. The
last line of stdout is one JSON document.
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
    "--flash-attention on --kv bf16",
    "--flash-attention on --kv q8_0",
    "--flash-attention on --ubatch 128",
    "--flash-attention on --no-repack",
    "--flash-attention off --no-repack",
    "--flash-attention off --huge-pages",
    "--flash-attention on --huge-pages",
    "--flash-attention on --huge-pages --kv q8_0",
)
RATES = ("decode_tokens_per_s", "prompt_tokens_per_s")


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
    rates = {setting: trial_rates([*command, *setting.split()], setting) for setting in options.settings}
    medians = {rate: {name: statistics.median(each[rate]) for name, each in rates.items()} for rate in RATES}
    finish(
        {
            "benchmark": "tune_llamacpp",
            "shape": options.model.stem,
            "threads": options.threads,
            "prompt_tokens": options.prompt_tokens,
            "peers": builds,
            "rates": {name: {rate: spread(values) for rate, values in each.items()} for name, each in rates.items()},
            "best": {rate: max(values, key=values.__getitem__) for rate, values in medians.items()},
        }
    )


def trial_rates(command: list[str], setting: str) -> dict[str, list[float]]:
    """Of every run but the first."""
    runs = run_json(command, timeout_s=None)["runs"][1:]
    rates = {rate: [run[rate] for run in runs] for rate in RATES}
    print(setting, {rate: round(statistics.median(values), 2) for rate, values in rates.items()}, file=sys.stderr)
    return rates


if __name__ == "__main__":
    main()
