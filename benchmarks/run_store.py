"""Prompt and decode tokens per second of offload_moe on a store, in one process of its own.

Usage: python benchmarks/run_store.py STORE --threads 2 --tokens 32 --prompt-tokens 64 [--ram 2.4GiB] [--prefetch 2]

The counterpart of peers/run_llamacpp.py: the same prompt, the same hot sampling, the same JSON on the last line.
Before the runs: seconds from the end of the imports to the first token of a short prompt, with the experts still on
disk; then every slot is filled. After them: how many distinct experts the decoded tokens used, beside what an even
spread would give. With `--live` it answers requests instead, see live.py.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness import HOT_SAMPLING, bind_to_cores, finish, peak_rss_bytes, prompt_ids, runner_arguments
from live import Answers, measured_runs

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

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


class StoreEngine:
    """A store with every slot filled. A prompt begins a stream of tokens, which `decode` continues."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._threads, self._cores = options.threads, os.sched_getaffinity(0)
        bind_to_cores(options.threads)
        began = time.perf_counter()
        import torch

        from offload_moe import load
        from offload_moe.native import kernels

        self.figures: dict[str, float] = {"import_s": time.perf_counter() - began}
        torch.set_num_threads(options.threads)
        kernels.set_threads(options.threads)
        chosen = {name: getattr(options, name) for name in ("policy", "prefetch") if getattr(options, name) is not None}
        self._context = options.context or options.prompt_tokens + options.tokens + 32
        began = time.perf_counter()
        self.model = load(options.store, ram=options.ram, context=self._context, **chosen)
        self.figures["load_s"] = time.perf_counter() - began
        self.model.hf.generation_config.eos_token_id = None
        with self.stream(prompt_ids(options.tokens, SHORT_PROMPT), max_new_tokens=1) as tokens:
            next(tokens)
        self.figures["first_token_s"] = time.perf_counter() - began
        fill(self.model)
        self._tokens: Any = None

    def stream(self, ids: list[int], **sampling: Any) -> Any:
        import torch

        from offload_moe.chat.prompt import stream_tokens

        return stream_tokens(self.model.hf, None, torch.tensor([ids]), **sampling)

    def prompt(self, *, num_tokens: int, seed: int, all_cores: bool = False) -> dict[str, float]:
        import torch

        self.end()
        room = self._context - num_tokens
        torch.manual_seed(seed)
        self._tokens = self.stream(prompt_ids(seed, num_tokens), **HOT_SAMPLING, max_new_tokens=room)
        began_cpu_s = time.process_time()
        with self.on_cores(len(self._cores) if all_cores else self._threads):
            next(self._tokens)
        return {
            "prompt_tokens_per_s": num_tokens / self._tokens.prompt_s,
            "prompt_cpu_ms": 1e3 * (time.process_time() - began_cpu_s) / num_tokens,
        }

    def decode(self, *, num_tokens: int) -> dict[str, float]:
        counted, decoded_s = self.model.stats.copy(), self._tokens.decode_s
        began_cpu_s = time.process_time()
        for _ in range(num_tokens):
            next(self._tokens)
        cpu_s, decode_s = time.process_time() - began_cpu_s, self._tokens.decode_s - decoded_s
        decoding = self.model.stats.since(counted)
        return {
            "decode_tokens_per_s": num_tokens / decode_s,
            "decode_cpu_ms": 1e3 * cpu_s / num_tokens,
            "decode_hit_rate": decoding.hit_rate,
            "decode_disk_bytes": decoding.disk_bytes,
            "decode_stall_s": decoding.stall_s,
            "decode_s": decode_s,
            "num_prefetches": decoding.num_prefetches,
            "num_useful_prefetches": decoding.num_useful_prefetches,
        }

    @contextmanager
    def on_cores(self, num_threads: int) -> Iterator[None]:
        if num_threads == self._threads:
            yield
            return
        self._use_threads(num_threads)
        try:
            yield
        finally:
            self._use_threads(self._threads)

    def _use_threads(self, num_threads: int) -> None:
        import torch

        from offload_moe.native import kernels

        os.sched_setaffinity(0, sorted(self._cores)[:num_threads])
        torch.set_num_threads(num_threads)
        kernels.set_threads(num_threads)

    def distinct(self, *, num_tokens: int) -> dict[str, float]:
        """How many distinct experts these tokens use, after a short prompt."""
        self.end()

        def generate() -> None:
            with self.stream(prompt_ids(0, SHORT_PROMPT), **HOT_SAMPLING, max_new_tokens=num_tokens) as tokens:
                for _ in tokens:
                    pass

        return distinct_experts(self.model, generate)

    def end(self) -> None:
        if self._tokens is not None:
            self._tokens.close()


def main() -> None:
    parser = runner_arguments(__doc__ or "")
    parser.add_argument("--context", type=int, default=None, help="tokens that there is room for")
    parser.add_argument("--live", action="store_true", help="answer requests, see live.py")
    options = parser.parse_args()
    answers = Answers() if options.live else None
    engine = StoreEngine(options)
    if answers is not None:
        answers.serve(engine, engine.figures)
    else:
        report(engine, options)
    engine.end()
    engine.model.close()


def report(engine: StoreEngine, options: argparse.Namespace) -> None:
    runs = measured_runs(engine, options)
    pools = engine.model.engine.hierarchy.pools
    finish(
        {
            **engine.figures,
            **engine.distinct(num_tokens=options.tokens),
            "peak_rss_bytes": peak_rss_bytes(),
            "num_ram_slots": pools.num_ram_slots,
            "slot_bytes": pools.slot_bytes,
            "runs": runs,
        }
    )


if __name__ == "__main__":
    main()
