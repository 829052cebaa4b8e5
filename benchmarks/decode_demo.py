"""Decode of the demo model, all experts in memory: ours against transformers' three experts implementations in bf16.

    python benchmarks/decode_demo.py [--checkpoint FOLDER] [--threads N] [--tokens N] [--trials N] [--unpinned]
    python benchmarks/decode_demo.py --resident 0.5 ...

Every candidate answers the same prompt greedily through `generate()`; the figure is tokens per second from the first
new token to the last. `--resident`: ours alone, with slots for that share of the experts, beside all of them resident
and beside going layer by layer, as a model does when somebody hooks its layers. Do not pin on a machine that is busy
with other work: a pinned OpenMP team waits for its cores.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import alternate, finish, paired_ratio, pin_threads, spread

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
RESIDENT, PARTLY, BY_LAYER = "ours resident", "ours partly", "ours partly, by layer"
PROMPT = "The history of the city begins with a river, a bridge and a market. In the first century"


def main() -> None:
    options = parse()
    if not options.unpinned:
        pin_threads(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    from offload_moe import demo
    from offload_moe.native import kernels

    checkpoint = options.checkpoint or demo.checkpoint()
    models = load_all(checkpoint) if options.resident is None else load_partly(checkpoint, options.resident)
    kernels.set_threads(options.threads, pinned_to_cores=not options.unpinned)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint)(PROMPT, return_tensors="pt").input_ids
    candidates: dict[str, Callable[[], float]] = {
        name: lambda hf=hf: decode_rate(hf, ids, options.tokens) for name, hf in models.items()
    }
    rates = alternate(candidates, num_trials=options.trials)
    report(rates, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--unpinned", action="store_true")
    parser.add_argument("--resident", type=float, help="share of the experts for which there are slots")
    return parser.parse_args()


def load_all(checkpoint: Path) -> dict[str, Any]:
    """Ours with the default store, with the lossless store in bf16 and in fp32, and transformers' own in bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    from offload_moe import load

    models = {
        "ours nf4": load(checkpoint).hf,
        "ours bf16": load(checkpoint, codec="bf16", dtype="bf16").hf,
        "ours bf16 in fp32": load(checkpoint, codec="bf16").hf,
    }
    for name in IMPLEMENTATIONS:
        hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, experts_implementation=name)
        models[f"transformers {name}"] = hf.eval().requires_grad_(False)
    return models


def load_partly(checkpoint: Path, share: float) -> dict[str, Any]:
    """Ours with the default store: all experts resident, and so many, with and without runs of layers."""
    from offload_moe import load

    models = {name: load(checkpoint) for name in (RESIDENT, PARTLY, BY_LAYER)}
    for name in (PARTLY, BY_LAYER):
        hierarchy = models[name].engine.hierarchy
        hierarchy.resize("ram", round(share * hierarchy.pools.keys.total))
    models[BY_LAYER].hf.model.layers[-1].register_forward_hook(lambda *_: None)
    return {name: model.hf for name, model in models.items()}


def decode_rate(hf: Any, ids: Any, num_tokens: int) -> float:
    """Tokens per second after the first."""
    import torch

    clock = Clock()
    with torch.inference_mode():
        hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            disable_compile=True,
            streamer=clock,
        )
    assert len(clock.times) == num_tokens
    return (num_tokens - 1) / (clock.times[-1] - clock.times[0])


class Clock:
    """A streamer that notes when each new token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._is_prompt = True

    def put(self, value: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
        else:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def report(rates: dict[str, list[float]], options: argparse.Namespace) -> None:
    medians = {name: spread(values) for name, values in rates.items()}
    peers = [name for name in rates if name == BY_LAYER or not name.startswith("ours")]
    fastest = max(peers, key=lambda name: medians[name]["median"])
    ratios = {name: paired_ratio(rates, name, fastest) for name in rates if name not in peers}
    for name, value in medians.items():
        print(f"{name:25s} {value['median']:7.1f} tok/s  ({value['min']:.1f} to {value['max']:.1f})", file=sys.stderr)
    for name, value in ratios.items():
        print(f"{name} / {fastest}: {value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})", file=sys.stderr)
    finish(
        {
            "benchmark": "decode_demo",
            "unit": "tokens per second",
            "threads": options.threads,
            "tokens": options.tokens,
            "pinned": not options.unpinned,
            "resident": options.resident,
            "rates": medians,
            "fastest_peer": fastest,
            "ratios": ratios,
        }
    )


if __name__ == "__main__":
    main()
