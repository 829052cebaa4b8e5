"""Prompt and decode tokens per second of offload_moe from disk, in one process of its own, and what was read.

Usage: python benchmarks/run_disk.py STORE --threads 2 --tokens 32 --prompt-tokens 64 [--ram 2.4GiB] [--prefetch 2]
       [--lru-slots 500]

The counterpart of peers/run_llamacpp.py: the same prompt, the same hot sampling, the same JSON on the last line.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness import HOT_SAMPLING, finish, io_bytes, peak_rss_bytes, prompt_ids, runner_arguments

if TYPE_CHECKING:
    from offload_moe.engine.model import Model
    from offload_moe.residency.counters import Counters

Accesses = list[tuple[int, list[int]]]


def record_accesses(model: "Model") -> Accesses:
    """The experts that every acquire asks for, as they are asked for."""
    accesses: Accesses = []
    policy: Any = model.engine.hierarchy.ram.residency.policy
    inner = policy.access

    def access(layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1) -> None:
        accesses.append((layer, list(keys)))
        inner(layer, keys, weights, num_tokens)

    policy.access = access
    return accesses


def replay_lru(accesses: Accesses, num_slots: int, first: int) -> float:
    """Hit rate of an LRU pool of that many slots over the accesses from `first` on, after those before it."""
    from offload_moe.native.kernels import SlotTable
    from offload_moe.residency.policy import LRU
    from offload_moe.residency.residency import Residency

    most_keys = max((max(keys) for _, keys in accesses), default=0) + 1
    residency = Residency(SlotTable(most_keys, num_slots), LRU())
    num_hits = num_asked = 0
    for index, (layer, keys) in enumerate(accesses):
        residency.policy.access(layer, keys)
        present = [key for key in keys if residency.find(key) is not None]
        if index >= first:
            num_hits, num_asked = num_hits + len(present), num_asked + len(keys)
        for key in keys:
            if residency.find(key) is None:
                slot = residency.admit(key, keep=keys if len(keys) < num_slots else ())
                assert slot is not None
                residency.loaded(slot)
    return num_hits / num_asked if num_asked else 0.0


def describe(decoding: "Counters", slot_bytes: int) -> dict[str, float]:
    """What decoding asked of the disk. Useful prefetches count as needed bytes, and not as hits of the cache."""
    num_fetched = decoding.num_misses + decoding.num_useful_prefetches
    return {
        "decode_hit_rate": 1 - num_fetched / decoding.num_accesses,
        "decode_hit_rate_with_prefetch": decoding.hit_rate,
        "decode_needed_bytes": num_fetched * slot_bytes,
        "decode_disk_bytes": decoding.disk_bytes,
        "decode_stall_s": decoding.stall_s,
        "num_prefetches": decoding.num_prefetches,
        "num_useful_prefetches": decoding.num_useful_prefetches,
        "num_cancelled_prefetches": decoding.num_cancelled_prefetches,
    }


def main() -> None:
    parser = runner_arguments(__doc__ or "")
    parser.add_argument("--context", type=int, default=None)
    parser.add_argument(
        "--lru-slots", type=int, default=None, help="replay the last run through LRU with so many slots"
    )
    options = parser.parse_args()

    began = time.perf_counter()
    import torch

    from offload_moe import load
    from offload_moe.chat.prompt import stream_tokens
    from offload_moe.native import kernels

    import_s = time.perf_counter() - began
    torch.set_num_threads(options.threads)
    kernels.set_threads(options.threads)
    names = ("policy", "prefetch", "context")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    began = time.perf_counter()
    model = load(options.store, ram=options.ram, **chosen)
    load_s = time.perf_counter() - began
    pools = model.engine.hierarchy.pools
    accesses = record_accesses(model)
    runs = []
    first_decode = 0
    for seed in range(options.runs):
        ids = torch.tensor([prompt_ids(seed, options.prompt_tokens)])
        before, counted = io_bytes()["from_disk"], model.stats.copy()
        model.hf.generation_config.eos_token_id = None
        sampling = HOT_SAMPLING | {"seed": seed, "max_new_tokens": options.tokens}
        with stream_tokens(model.hf, None, ids, **sampling) as tokens:
            num_tokens, prompt_counters = 0, counted
            for _ in tokens:
                num_tokens += 1
                if num_tokens == 1:
                    prompt_counters, first_decode = model.stats.copy(), len(accesses)
            prompting, decoding = prompt_counters.since(counted), model.stats.since(prompt_counters)
            runs.append(
                {
                    "prompt_tokens_per_s": options.prompt_tokens / tokens.prompt_s,
                    "prompt_disk_bytes": prompting.disk_bytes,
                    "prompt_s": tokens.prompt_s,
                    "decode_tokens_per_s": (num_tokens - 1) / tokens.decode_s,
                    "decode_s": tokens.decode_s,
                    "disk_bytes": io_bytes()["from_disk"] - before,
                    **describe(decoding, pools.slot_bytes),
                }
            )
    document = {
        "import_s": import_s,
        "load_s": load_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "num_ram_slots": model.engine.hierarchy.num_slots("ram"),
        "slot_bytes": pools.slot_bytes,
        "runs": runs,
    }
    if options.lru_slots:
        document["lru_hit_rate"] = replay_lru(accesses, options.lru_slots, first_decode)
    finish(document)
    model.close()


if __name__ == "__main__":
    main()
