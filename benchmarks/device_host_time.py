#!/usr/bin/env python3
"""Host time of a token in the device pass, on the fake driver, whose calls return at once.

Shapes of real models with tiny tensors: the number of layers, experts and launches is theirs, the matrices are not.
Seconds of the calling thread's processor. A real driver's calls are in none of them: nothing here runs on a card.
The log of each pass is written as a card would: every expert that a row chose was there. So the account of each pass is
counted; with a card it is made while that computes the next pass. Beside it, in the same trials, a token through the
decoder's modules.

    python benchmarks/device_host_time.py --trials 5 --tokens 100
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from harness import finish, paired_ratio, spread

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
    parser.add_argument("--module-tokens", type=int, default=4, help="in each trial through the decoder's modules")
    options = parser.parse_args()
    finish({"host_time": {name: measure(name, options) for name in options.shapes.split(",")}})


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from support.tiny_models import tiny_model

    from offload_moe.convert.quantize import quantize

    family, sizes = SHAPES[name]
    if options.layers is not None:
        sizes = {**sizes, "num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        tiny_model(family, **sizes).to(torch.bfloat16).save_pretrained(checkpoint)
        store = quantize(checkpoint, Path(folder) / "store", codec="nf4")
        return {mode: measure_mode(store, mode, options) for mode in ("queued", "stepwise")}


def measure_mode(store: Path, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    from support.card_model import card_model
    from support.cuda import fake

    with fake.FakeDriver(no_kernels=1) as driver:
        with card_model(store, driver, 512, 256, shim_mode="plain") as model:
            model.card.mode.mode = mode
            found = trials(model, driver, options)
        driver.problems()
    return found


def trials(model: Any, driver: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a token: until all is queued, until the pass has ended, with the step loop, by modules."""
    from transformers import DynamicCache

    from offload_moe.decode.next_token import Draw, Wanted

    card, hf, count = model.card, model.hf, options.tokens
    cache = prompt(hf, DynamicCache(config=hf.config))
    wanted = partial(Wanted, draw=Draw())
    driver.set(at_once=1)
    figures: dict[str, list[float]] = {"queued_ms": [], "pass_ms": [], "step_loop_ms": [], "modules_ms": []}
    with routed(model):
        card.run([5], [cache.get_seq_length()], [cache], wanted())
        for _ in range(options.trials):
            before, began = card.queued_s, time.thread_time()
            for _ in range(count):
                card.run([5], [cache.get_seq_length()], [cache], wanted())
            passed_s, queued_s = time.thread_time() - began, card.queued_s - before
            looped_s = seconds_of_loop(hf, count)
            cache = prompt(hf, DynamicCache(config=hf.config))
            by_modules_s = seconds_by_modules(hf, cache, options.module_tokens)
            card.run([5], [cache.get_seq_length()], [cache], wanted())
            if card.mode.mode == "queued":
                figures["queued_ms"].append(1e3 * queued_s / count)
            figures["pass_ms"].append(1e3 * passed_s / count)
            figures["step_loop_ms"].append(1e3 * looped_s / count)
            figures["modules_ms"].append(1e3 * by_modules_s / options.module_tokens)
    layers = len(card.parts.layers)
    found: dict[str, Any] = {name: spread(values) for name, values in figures.items() if values}
    names = "pass", "step_loop", "modules"
    per_layer = {f"{name}_us": 1e3 * found[f"{name}_ms"]["median"] / layers for name in names}
    ratio = paired_ratio(figures, "modules_ms", "step_loop_ms")
    return {"layers": layers, **found, "per_layer": per_layer, "modules_over_step_loop": ratio}


@contextmanager
def routed(model: Any, num_tokens: int = 64) -> Iterator[None]:
    """Write the log of each pass as it is queued: experts of each layer by a law of Zipf's kind, all of them hits."""
    import numpy as np

    from offload_moe.card.account import Account
    from offload_moe.card.launches import launch
    from offload_moe.card.log import HEAD

    draw, layers, keys = np.random.default_rng(0), model.card.parts.layers, model.engine.hierarchy.pools.keys
    tops = {at: layer.spec.router.top_k for at, layer in enumerate(layers) if layer.spec.router is not None}
    lines = np.zeros((num_tokens, len(layers), launch("OM_CARD_LOG_INTS", max(tops.values()))), dtype=np.int32)
    for (at, top_k), num_experts in zip(tops.items(), keys.num_experts, strict=True):
        ranks = np.log(1 + np.arange(num_experts))[draw.permutation(num_experts)]
        noisy = ranks - draw.gumbel(size=(num_tokens, num_experts))
        lines[:, at, HEAD : HEAD + top_k] = np.argsort(noisy, axis=1)[:, :top_k]
    log = model.card.tables.log[: lines[0].size].reshape(lines[0].shape)
    begin = Account.begin

    def written(account: Any, number: int) -> None:
        begin(account, number)
        log[:] = lines[number % num_tokens]
        log[:, 0] = number

    Account.begin = written  # type: ignore[method-assign]
    try:
        yield
    finally:
        Account.begin = begin  # type: ignore[method-assign]


def prompt(hf: Any, cache: Any) -> Any:
    import torch

    from offload_moe.decode.cache import give_room
    from offload_moe.families.cache_name import with_cache

    give_room(cache, 4096, torch.bfloat16)
    with torch.inference_mode():
        hf(input_ids=torch.arange(3, 12)[None], **with_cache(cache), use_cache=True)
    return cache


def seconds_of_loop(hf: Any, count: int) -> float:
    """Greedy tokens through the product's own loop, stopping rules included."""
    import torch
    from transformers import GenerationConfig

    from offload_moe.chat.stream import TokenStream

    config = GenerationConfig(max_new_tokens=count + 2, do_sample=False, eos_token_id=2, disable_compile=True)
    with TokenStream(hf, torch.arange(3, 12)[None], config) as stream:
        for _ in range(2):
            next(stream)
        began = time.thread_time()
        num_tokens = len(list(stream))
        passed_s = time.thread_time() - began
    assert num_tokens == count
    return passed_s


def seconds_by_modules(hf: Any, cache: Any, count: int) -> float:
    """Tokens that go through the decoder's modules, as they do where there is no device pass."""
    import torch

    from offload_moe.families.cache_name import with_cache

    decoder, token = hf.get_decoder(), torch.tensor([[5]])
    began = time.thread_time()
    with torch.inference_mode():
        for _ in range(count):
            decoder(input_ids=token, **with_cache(cache), use_cache=True, return_dict=False)
    return time.thread_time() - began


if __name__ == "__main__":
    main()
