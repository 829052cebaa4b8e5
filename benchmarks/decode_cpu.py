"""Decode and prompt speed on the CPU, everything in memory, against llama.cpp's Q4_0 on the same shape.

Usage: python benchmarks/decode_cpu.py --config benchmarks/configs/OLMoE-1B-7B-0125.json --folder SCRATCH
       [--threads 2] [--trials 5] [--prompt-tokens 64] [--tokens 32] [--transformers] [--layers N]

Files are made in SCRATCH with random weights when they are not there yet. Processes alternate, each bound to as many
cores as threads; a trial is the last of two runs in a process, and the ratio is taken trial by trial.
`--transformers` adds transformers in bf16 and with bitsandbytes' 4-bit linears on a checkpoint of the same shape;
`--layers` makes every model that much shorter, where the whole one in bf16 does not fit. The last line of stdout is
one JSON document. Without llama.cpp (`pip install xllamacpp`) its columns are missing.

On a machine that is busy with other work, wall-clock rates of spinning thread pools mean little; CPU milliseconds per
token with `--threads 1` still do.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness import HERE, alternate, finish, has_llamacpp, make, paired_ratio, run_json, spread

LLAMA = "llama.cpp"
DISTINCT = ("distinct_experts_per_layer", "distinct_if_spread_evenly")


def ensure_files(options: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each candidate, on files of this shape."""
    config: Path = options.config
    if options.layers is not None:
        shorter = {**json.loads(config.read_text()), "num_hidden_layers": options.layers}
        config = options.folder / f"{config.stem}-{options.layers}.json"
        config.write_text(json.dumps(shorter))
    store, gguf, checkpoint = (options.folder / f"{config.stem}{end}" for end in ("-store", ".gguf", "-bf16"))
    make("synthesize.py", config, store)
    commands = {"offload_moe": [str(HERE / "run_store.py"), str(store)]}
    if has_llamacpp():
        make("peers/make_random_gguf.py", config, gguf)
        commands[LLAMA] = [str(HERE / "peers/run_llamacpp.py"), str(gguf)]
    if options.transformers:
        make("peers/make_random_checkpoint.py", config, checkpoint)
        peer = [str(HERE / "peers/run_transformers.py"), str(checkpoint)]
        commands |= {"transformers bf16": peer, "transformers bitsandbytes": [*peer, "--bitsandbytes"]}
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs/OLMoE-1B-7B-0125.json")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    shared = ["--threads", str(options.threads), "--tokens", str(options.tokens)]
    shared += ["--prompt-tokens", str(options.prompt_tokens)]
    commands = {name: [sys.executable, *command, *shared] for name, command in ensure_files(options).items()}
    documents: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}

    def trial(name: str) -> float:
        document = run_json(commands[name])
        documents[name].append(document)
        print(name, document["runs"][-1], file=sys.stderr, flush=True)
        return float(document["runs"][-1]["decode_tokens_per_s"])

    decodes = alternate(
        {name: lambda name=name: trial(name) for name in commands}, num_trials=options.trials, num_warmups=0
    )
    prompts = {name: [each["runs"][-1]["prompt_tokens_per_s"] for each in made] for name, made in documents.items()}
    cpu = {name: [each["runs"][-1].get("decode_cpu_ms", 0.0) for each in made] for name, made in documents.items()}
    peers = [name for name in commands if name != "offload_moe"]
    finish(
        {
            "benchmark": "decode_cpu",
            "shape": options.config.stem,
            "layers": options.layers,
            "threads": options.threads,
            "prompt_tokens": options.prompt_tokens,
            "tokens": options.tokens,
            "decode_tokens_per_s": {name: spread(values) for name, values in decodes.items()},
            "prompt_tokens_per_s": {name: spread(values) for name, values in prompts.items()},
            "decode_ratios": {f"vs {name}": paired_ratio(decodes, "offload_moe", name) for name in peers},
            "decode_cpu_ms": {name: spread(cpu[name]) for name in ("offload_moe", LLAMA) if name in cpu},
            "decode_cpu_ratio_llamacpp_over_ours": paired_ratio(cpu, LLAMA, "offload_moe") if LLAMA in cpu else None,
            "prompt_ratios": {f"vs {name}": paired_ratio(prompts, "offload_moe", name) for name in peers},
            "offload_moe": {
                name: spread([float(each[name]) for each in documents["offload_moe"]])
                for name in ("import_s", "load_s", "first_token_s", *DISTINCT)
            },
        }
    )


if __name__ == "__main__":
    main()
