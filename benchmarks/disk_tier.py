"""A model larger than memory: decode from disk under a memory limit, against llama.cpp's mapped file under it.

Usage: python benchmarks/disk_tier.py --folder SCRATCH [--limit 2500000000] [--trials 5] [--trial-log FILE.jsonl]
       [--native PYTHON | --wheel PYTHON] [--accelerate 1] (needs root for the cgroup)

Both files are written first and their pages dropped before every run; the engines alternate. `share_of_bound`: the
time that the needed bytes take at the disk's own rate of random direct reads of whole records, measured before and
after each of our runs, over the time that decoding took. `hit_rate` counts what the cache held, not what a prefetch
brought in time. `lru_hit_rate`: an LRU replay of the same routing with the slots that (limit - dense weights on disk -
450 MB) leaves. A trial log lets several calls add trials to one result. The last line of stdout is one JSON document.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness import (
    HERE,
    can_limit_memory,
    finish,
    forget_cached,
    make,
    paired_ratio,
    random_read_bytes_per_s,
    run_json,
    spread,
)
from llamacpp_builds import add_options, chosen_pythons, describe_builds

OURS, LLAMA, ACCELERATE = "offload_moe", "llama.cpp", "accelerate"
RUNTIME_BYTES = 450_000_000  # of the LRU replay that we are compared with
SHARE_OF_LIMIT = 0.97  # the rest is left to what the kernel charges beside the process's own memory

Trial = dict[str, Any]


def our_trial(store: Path, options: argparse.Namespace, shared: list[str], lru_slots: int) -> Trial:
    """One run between two measurements of the disk."""
    records = next(store.glob("experts-*"))
    command = [sys.executable, str(HERE / "run_disk.py"), str(store), *shared]
    command += ["--ram", f"{int(options.limit * SHARE_OF_LIMIT)}B", "--lru-slots", str(lru_slots)]
    command += ["--policy", options.policy] if options.policy else []
    forget_cached(store)
    before = random_read_bytes_per_s(records, options.record_bytes)
    result = run_json(command, memory_limit=options.enforced_limit)
    after = random_read_bytes_per_s(records, options.record_bytes)
    rate = 2 / (1 / before + 1 / after)
    last = result["runs"][-1]
    kept = {name: result[name] for name in ("num_ram_slots", "slot_bytes", "peak_rss_bytes", "lru_hit_rate")}
    share = last["decode_needed_bytes"] / rate / last["decode_s"]
    return {**last, **kept, "disk_bytes_per_s": rate, "share_of_bound": share}


def peer_trial(python: str, script: str, file: Path, options: argparse.Namespace, arguments: list[str]) -> Trial:
    forget_cached(file)
    command = [python, str(HERE / "peers" / script), str(file), *arguments]
    result = run_json(command, memory_limit=options.enforced_limit)
    return {**result["runs"][-1], "peak_rss_bytes": result["peak_rss_bytes"]}


def accelerate_trial(options: argparse.Namespace) -> Trial:
    """Its weights are written outside of the memory limit, by a process of their own."""
    script, folder = "run_accelerate.py", options.folder / f"{options.config.stem}-accelerate"
    arguments = ["--config", str(options.config)]
    if not (folder / "index.json").exists():
        run_json(
            [sys.executable, str(HERE / "peers" / script), str(folder), *arguments, "--write-only"], timeout_s=None
        )
    return peer_trial(sys.executable, script, folder, options, arguments)


def run_trials(options: argparse.Namespace, store: Path, gguf: Path) -> list[dict[str, Trial]]:
    """Those in the log and the ones run now; a trial is logged when it is complete."""
    log: Path | None = options.trial_log
    trials = [json.loads(line) for line in log.read_text().splitlines()] if log is not None and log.exists() else []
    shared = ["--threads", str(options.threads), "--prompt-tokens", str(options.prompt_tokens), "--tokens"]
    context = ["--context", str(options.prompt_tokens + options.tokens + 32)]

    def keep(trial: dict[str, Trial]) -> None:
        print(json.dumps(trial), file=sys.stderr, flush=True)
        trials.append(trial)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(trial) + "\n")

    for _ in range(options.trials):
        trial = {OURS: our_trial(store, options, [*shared, str(options.tokens), *context], options.lru_slots)}
        if options.peer_tokens:
            arguments = [*shared, str(options.peer_tokens), *context, "--mapped"]
            trial[LLAMA] = peer_trial(options.peer_python, "run_llamacpp.py", gguf, options, arguments)
        keep(trial)
    for _ in range(options.accelerate):
        keep({ACCELERATE: accelerate_trial(options)})
    return trials


def report(options: argparse.Namespace, trials: list[dict[str, Trial]]) -> dict[str, Any]:
    def figures(name: str, engine: str = OURS) -> list[float]:
        return [trial[engine][name] for trial in trials if engine in trial]

    decodes = {engine: figures("decode_tokens_per_s", engine) for engine in (OURS, LLAMA, ACCELERATE)}
    prompts = {engine: figures("prompt_tokens_per_s", engine) for engine in (OURS, LLAMA, ACCELERATE)}
    return {
        "benchmark": "disk_tier",
        "shape": options.config.stem,
        "limit_bytes": options.limit,
        "is_limit_enforced": options.enforced_limit is not None,
        "threads": options.threads,
        "peers": options.builds,
        "num_trials": len(figures("share_of_bound")),
        "prompt_tokens": options.prompt_tokens,
        "decode_ratio_vs_llamacpp": paired_ratio(decodes, OURS, LLAMA) if decodes[LLAMA] else None,
        "prompt_ratio_vs_llamacpp": paired_ratio(prompts, OURS, LLAMA) if prompts[LLAMA] else None,
        "share_of_bound": spread(figures("share_of_bound")),
        "hit_rate": spread(figures("decode_hit_rate")),
        "hit_rate_with_prefetch": spread(figures("decode_hit_rate_with_prefetch")),
        "lru_hit_rate": spread(figures("lru_hit_rate")),
        "lru_slots": options.lru_slots,
        "num_ram_slots": figures("num_ram_slots")[-1],
        "peak_rss_bytes": max(figures("peak_rss_bytes")),
        "disk_bytes_per_s": spread(figures("disk_bytes_per_s")),
        "decode_tokens_per_s": {engine: spread(values) for engine, values in decodes.items() if values},
        "prompt_tokens_per_s": {engine: spread(values) for engine, values in prompts.items() if values},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs/OLMoE-1B-7B-0125.json")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=2_500_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--peer-tokens", type=int, default=12, help="of llama.cpp, seconds for each; 0: without it")
    parser.add_argument("--policy", default=None)
    parser.add_argument("--trial-log", type=Path)
    parser.add_argument("--accelerate", type=int, default=0, help="runs of accelerate's disk offload, after the trials")
    add_options(parser)
    options = parser.parse_args()
    options.enforced_limit = options.limit if can_limit_memory() else None
    pythons = dict(list(chosen_pythons(options).items())[:1]) if options.peer_tokens else {}
    options.builds, options.peer_python = describe_builds(pythons), next(iter(pythons.values()), None)
    options.peer_tokens = options.peer_tokens if pythons else 0
    store, gguf = (options.folder / f"{options.config.stem}{end}" for end in ("-store", ".gguf"))
    make("synthesize.py", options.config, store)
    if options.peer_tokens:
        make("peers/make_random_gguf.py", options.config, gguf)
    manifest = json.loads((store / "store.json").read_text())
    options.record_bytes = max(layer["record_bytes"] for layer in manifest["layers"])
    dense_bytes = sum(file.stat().st_size for file in store.glob("dense-*"))
    options.lru_slots = (options.limit - dense_bytes - RUNTIME_BYTES) // options.record_bytes
    finish(report(options, run_trials(options, store, gguf)))


if __name__ == "__main__":
    main()
