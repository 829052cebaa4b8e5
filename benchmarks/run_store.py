"""Prompt and decode tokens per second of offload_moe on a store, in one process of its own.

Usage: python benchmarks/run_store.py STORE --threads 2 --tokens 32 --prompt-tokens 64 [--ram 2.4GiB] [--prefetch 2]

The counterpart of peers/run_llamacpp.py: the same prompt, the same hot sampling, the same JSON on the last line.
"""

import argparse
import json
import resource
import time
from pathlib import Path


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--ram", default=None)
    parser.add_argument("--policy", default=None)
    parser.add_argument("--prefetch", type=int, default=None)
    options = parser.parse_args()

    began = time.perf_counter()
    import torch

    from offload_moe import kernels, load
    from offload_moe.generate import stream_tokens

    import_s = time.perf_counter() - began
    torch.set_num_threads(options.threads)
    if kernels.available():
        kernels.set_threads(options.threads)
    chosen = {name: getattr(options, name) for name in ("policy", "prefetch") if getattr(options, name) is not None}
    began = time.perf_counter()
    model = load(options.store, ram=options.ram, **chosen)
    load_s = time.perf_counter() - began
    runs = []
    for seed in range(options.runs):
        ids = torch.tensor([[(i * 37 + seed * 101) % 20000 + 300 for i in range(options.prompt_tokens)]])
        before, counted = read_bytes(), model.stats.copy()
        model.hf.generation_config.eos_token_id = None
        sampling = {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "seed": seed, "max_new_tokens": options.tokens}
        with stream_tokens(model.hf, None, ids, **sampling) as tokens:
            num_tokens, prompt_counters = 0, counted
            for _ in tokens:
                num_tokens += 1
                if num_tokens == 1:
                    prompt_counters = model.stats.copy()
            decoding = model.stats.since(prompt_counters)
            runs.append(
                {
                    "prompt_tokens_per_s": options.prompt_tokens / tokens.prompt_s,
                    "decode_tokens_per_s": (num_tokens - 1) / tokens.decode_s,
                    "disk_bytes": read_bytes() - before,
                    "decode_hit_rate": decoding.hit_rate,
                    "decode_disk_bytes": decoding.disk_bytes,
                    "decode_stall_s": decoding.stall_s,
                    "decode_s": tokens.decode_s,
                    "num_prefetches": decoding.num_prefetches,
                    "num_useful_prefetches": decoding.num_useful_prefetches,
                }
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pools = model._hierarchy.pools
    print(
        json.dumps(
            {
                "import_s": import_s,
                "load_s": load_s,
                "peak_rss_bytes": peak,
                "num_ram_slots": pools.num_ram_slots,
                "slot_bytes": pools.slot_bytes,
                "runs": runs,
            }
        )
    )
    model.close()


if __name__ == "__main__":
    main()
