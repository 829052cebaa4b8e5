#!/usr/bin/env python3
"""Host time of a token in the device pass, on the fake driver with kernels that do nothing.

Shapes of real models with tiny tensors: the number of layers, experts and launches is theirs, the matrices are not. The
fake driver's calls are in it, a real one's are not. Seconds of the calling thread's processor, not of a clock. Nothing
here runs on a card.

    python benchmarks/device_host_time.py --trials 5 --tokens 100
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import finish, spread

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "Qwen3-30B-A3B": ("qwen3_moe", {"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8}),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "num_hidden_layers": 61,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "qk_rope_head_dim": 16,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "moe_intermediate_size": 16,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--layers", type=int, help="instead of the model's")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100)
    options = parser.parse_args()
    finish({"host_time": {name: measure(name, options) for name in options.shapes.split(",")}})


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from support.card_model import card_model
    from support.cuda import fake
    from support.tiny_models import tiny_model

    from offload_moe.convert.quantize import quantize

    family, sizes = SHAPES[name]
    if options.layers is not None:
        sizes = {**sizes, "num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        tiny_model(family, **sizes).to(torch.bfloat16).save_pretrained(checkpoint)
        store = quantize(checkpoint, Path(folder) / "store", codec="nf4")
        with fake.FakeDriver() as driver, card_model(store, driver, 512, 256) as model:
            found = trials(model, driver, options)
            driver.problems()
    return found


def trials(model: Any, driver: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a token until all is queued, which is what a card waits for; and with loop, head and sampling.

    The account of a pass is made while the card computes the next one, and is not in these figures.
    """
    from transformers import DynamicCache

    card, hf = model.card, model.hf
    card.mode.mode = "queued"
    cache = prompt(hf, DynamicCache(config=hf.config))
    card.run([5], [cache.get_seq_length()], [cache])  # with kernels
    driver.set(no_kernels=1)
    queued, loop = [], []
    for _ in range(options.trials):
        driver.forget_counts()
        before = card.queued_s
        for _ in range(options.tokens):
            card.run([5], [cache.get_seq_length()], [cache])
        queued.append(1e3 * (card.queued_s - before) / options.tokens)
        launches = driver.count("cuGraphLaunch") / options.tokens
        cache.crop(-options.tokens)
        loop.append(1e3 * seconds_of_loop(hf, options.tokens) / options.tokens)
    return {
        "layers": len(card.parts.layers),
        "graph_launches": launches,
        "queued_ms": spread(queued),
        "with_loop_head_and_sampling_ms": spread(loop),
    }


def prompt(hf: Any, cache: Any) -> Any:
    import torch

    from offload_moe.decode.cache import give_room

    give_room(cache, 4096, torch.bfloat16)
    with torch.inference_mode():
        hf(input_ids=torch.arange(3, 12)[None], past_key_values=cache, use_cache=True)
    return cache


def seconds_of_loop(hf: Any, count: int) -> float:
    """Greedy tokens through the product's own loop, its head on the CPU and stopping rules included."""
    import torch
    from transformers import GenerationConfig

    from offload_moe.chat.stream import TokenStream

    config = GenerationConfig(max_new_tokens=count + 1, do_sample=False, eos_token_id=None, disable_compile=True)
    with TokenStream(hf, torch.arange(3, 12)[None], config) as stream:
        next(stream)
        began = time.thread_time()
        for _ in stream:
            pass
        return time.thread_time() - began


if __name__ == "__main__":
    main()
