"""Prompt and decode tokens per second of offload_moe on a store, in one process of its own.

Usage: python benchmarks/run_store.py STORE --threads 2 --tokens 32 --prompt-tokens 64 [--ram 2.4GiB] [--prefetch 2]

The counterpart of peers/run_llamacpp.py: the same prompt, the same hot sampling, the same JSON on the last line.
Before the runs: seconds from the end of the imports to the first token of a short prompt, with the experts still on
disk; then every slot is filled. After them: how many distinct experts the decoded tokens used, beside what an even
spread would give.
"""

import statistics
import time
from typing import Any

from harness import HOT_SAMPLING, bind_to_cores, finish, io_bytes, peak_rss_bytes, prompt_ids, runner_arguments

SHORT_PROMPT = 4


class Distinct:
    """Counts the distinct experts that decode steps use in each layer; in place of a recorder."""

    def __init__(self, num_experts: list[int]) -> None:
        self.num_experts = num_experts
        self.used: list[set[int]] = [set() for _ in num_experts]
        self.num_tokens = self.top_k = 0

    def begin(self, layer: int, top_k_index: Any, top_k_weights: Any) -> None:
        if len(top_k_index) == 1:
            self.used[layer] |= set(top_k_index[0].tolist())
            self.num_tokens += layer == 0
            self.top_k = top_k_index.shape[1]

    def end(self) -> None:
        pass

    def ran(self, layers: Any) -> None:
        for layer, ids in enumerate(layers.ids.split(1), layers.first_layer):
            self.begin(layer, ids, None)

    def means(self) -> dict[str, float]:
        """Over the layers, beside what an even spread would give."""
        if_even = [count * (1 - (1 - self.top_k / count) ** self.num_tokens) for count in self.num_experts]
        return {
            "distinct_experts_per_layer": statistics.mean(len(used) for used in self.used),
            "distinct_if_spread_evenly": statistics.mean(if_even),
        }


def distinct_experts(model: Any, generate: Any) -> dict[str, float]:
    """Of one more run."""
    bound = model.engine.experts
    counter = Distinct([layer.num_experts for layer in model.layers])
    for experts in bound:
        experts.recorder = counter
    generate()
    for experts in bound:
        experts.recorder = None
    return counter.means()


def fill(model: Any) -> None:
    """Bring every expert for which there is a slot: what was never used would be a miss."""
    pools, ram = model.engine.hierarchy.pools, model.engine.hierarchy.ram
    num_wanted = min(pools.num_ram_slots, pools.keys.total)
    ram.fill(range(pools.keys.total))
    while len(ram.residency.resident_keys()) < num_wanted:
        time.sleep(0.05)


def main() -> None:
    parser = runner_arguments(__doc__ or "")
    options = parser.parse_args()

    bind_to_cores(options.threads)
    began = time.perf_counter()
    import torch

    from offload_moe import load
    from offload_moe.chat.prompt import stream_tokens
    from offload_moe.native import kernels

    import_s = time.perf_counter() - began

    def prompt(seed: int, num_tokens: int) -> Any:
        return torch.tensor([prompt_ids(seed, num_tokens)])

    torch.set_num_threads(options.threads)
    kernels.set_threads(options.threads)
    chosen = {name: getattr(options, name) for name in ("policy", "prefetch") if getattr(options, name) is not None}
    began = time.perf_counter()
    model = load(options.store, ram=options.ram, context=options.prompt_tokens + options.tokens + 32, **chosen)
    load_s = time.perf_counter() - began
    model.hf.generation_config.eos_token_id = None
    with stream_tokens(model.hf, None, prompt(options.tokens, SHORT_PROMPT), max_new_tokens=1) as tokens:
        next(tokens)
    first_token_s = time.perf_counter() - began
    fill(model)
    runs: list[dict[str, float]] = []
    sampling: dict[str, Any] = HOT_SAMPLING | {"max_new_tokens": options.tokens}
    for seed in range(options.runs):
        ids = prompt(seed, options.prompt_tokens)
        before, counted = io_bytes()["from_disk"], model.stats.copy()
        with stream_tokens(model.hf, None, ids, seed=seed, **sampling) as tokens:
            num_tokens, prompt_counters, prompt_cpu_s = 0, counted, 0.0
            for _ in tokens:
                num_tokens += 1
                if num_tokens == 1:
                    prompt_counters, prompt_cpu_s = model.stats.copy(), time.process_time()
            decode_cpu_s = time.process_time() - prompt_cpu_s
            decoding = model.stats.since(prompt_counters)
            runs.append(
                {
                    "prompt_tokens_per_s": options.prompt_tokens / tokens.prompt_s,
                    "decode_tokens_per_s": (num_tokens - 1) / tokens.decode_s,
                    "decode_cpu_ms": 1e3 * decode_cpu_s / (num_tokens - 1),
                    "disk_bytes": io_bytes()["from_disk"] - before,
                    "decode_hit_rate": decoding.hit_rate,
                    "decode_disk_bytes": decoding.disk_bytes,
                    "decode_stall_s": decoding.stall_s,
                    "decode_s": tokens.decode_s,
                    "num_prefetches": decoding.num_prefetches,
                    "num_useful_prefetches": decoding.num_useful_prefetches,
                }
            )

    def once_more() -> None:
        with stream_tokens(model.hf, None, prompt(0, SHORT_PROMPT), **sampling) as tokens:
            for _ in tokens:
                pass

    distinct = distinct_experts(model, once_more)
    pools = model.engine.hierarchy.pools
    finish(
        {
            "import_s": import_s,
            "load_s": load_s,
            "first_token_s": first_token_s,
            **distinct,
            "peak_rss_bytes": peak_rss_bytes(),
            "num_ram_slots": pools.num_ram_slots,
            "slot_bytes": pools.slot_bytes,
            "runs": runs,
        }
    )
    model.close()


if __name__ == "__main__":
    main()
