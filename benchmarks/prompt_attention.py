"""A prompt's attention in one layer: our kernel over a cache in bf16, beside torch's on a widened copy of it.

    python benchmarks/prompt_attention.py [--trials 5] [--threads 1] [--heads 16x16x128,32x4x128] [--latents 16x512x64]
                                          [--prompts 512,4000] [--chunk 512] [--sets avx512vbmi] [--unpinned]

Heads are QUERIESxKEYSxDIM, latents HEADSxRANKxROTATED, whose unrotated keys and values have 128 dims: torch expands
them, and our call moves queries into the latent space and results out of it; both include that. A prompt comes in
chunks of so many tokens, each behind those before it. `ms` is one layer's, of the whole prompt; with one thread, time
is the process's own. `gfma_per_s` counts the products of queries with keys and of shares with values that a causal
prompt needs, latents expanded. The last line is one JSON document.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attention import linear
from harness import alternate, finish, paired_ratio, runnable_sets, spread
from torch import Tensor
from torch.nn.functional import linear as multiply
from torch.nn.functional import scaled_dot_product_attention

from offload_moe.native import kernels

HIDDEN, PLAIN_DIMS = 64, 128  # of latents: unrotated dims of keys, and dims of values
Part = Callable[[int, int], None]  # the tokens of a prompt from one on, up to another


def main() -> None:
    options = parse_options()
    if not options.unpinned:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    kernels.set_threads(options.threads, pinned_to_cores=not options.unpinned)
    shapes = [f"heads {shape}" for shape in options.heads] + [f"latents {shape}" for shape in options.latents]
    results = [measure(options, what, length) for length in options.prompts for what in shapes]
    finish({"benchmark": "prompt_attention", "trials": options.trials, "threads": options.threads, "results": results})


def parse_options() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=words, default=["16x16x128", "32x4x128"])
    parser.add_argument("--latents", type=words, default=["16x512x64"])
    parser.add_argument("--prompts", type=lambda text: [int(part) for part in text.split(",")], default=[512, 4000])
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--sets", type=words, default=["avx512vbmi"])
    parser.add_argument("--unpinned", action="store_true", help="on a machine that is busy with other work")
    return parser.parse_args()


def measure(options: argparse.Namespace, what: str, length: int) -> dict[str, Any]:
    kind, shape = what.split()
    sizes = [int(part) for part in shape.split("x")]
    ours, torchs = (latent_parts if kind == "latents" else grouped_parts)(sizes, length)
    chunks = [(first, min(first + options.chunk, length)) for first in range(0, length, options.chunk)]
    clock = time.process_time if options.threads == 1 else time.perf_counter
    candidates = {name: partial(run, ours, chunks, clock, name) for name in runnable_sets(options.sets)}
    values = alternate(
        {**candidates, "torch": partial(run, torchs, chunks, clock, None)}, num_trials=options.trials, num_warmups=1
    )
    widths = 2 * PLAIN_DIMS + sizes[2] if kind == "latents" else 2 * sizes[2]
    products = sizes[0] * widths * length * (length + 1) / 2
    found: dict[str, Any] = {"attention": what, "prompt": length, "chunk": options.chunk}
    for name, seconds in values.items():
        found[name] = {
            "ms": spread([each * 1e3 for each in seconds]),
            "gfma_per_s": spread([products / each / 1e9 for each in seconds]),
        }
        if name != "torch":
            found[name]["times_torch"] = paired_ratio(values, "torch", name)
        print(
            f"{what:20} {length:6} tokens  {name:10} {found[name]['ms']['median']:9.2f} ms", file=sys.stderr, flush=True
        )
    return found


def run(part: Part, chunks: list[tuple[int, int]], clock: Callable[[], float], name: str | None) -> float:
    kernels.select_instruction_set(name)
    began = clock()
    for first, end in chunks:
        part(first, end)
    return clock() - began


def causal(first: int, end: int) -> Tensor:
    return torch.arange(end) <= torch.arange(first, end)[:, None]


def attend(query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
    """As transformers calls it: ``[1, N, T, D]`` over ``[1, M, S, D]``."""
    is_first = first == 0
    mask = None if is_first else causal(first, key.shape[2])
    is_grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_first, enable_gqa=is_grouped)


def grouped_parts(sizes: list[int], length: int) -> tuple[Part, Part]:
    heads, kv_heads, dim = sizes
    keys, values = (torch.randn(1, kv_heads, length, dim).bfloat16() for _ in "kv")
    queries = torch.randn(length, heads, dim)
    kernel = kernels.AttendKernel(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scaling=dim**-0.5,
        sinks=None,
        cache_dtype=torch.bfloat16,
    )

    def ours(first: int, end: int) -> None:
        out = torch.empty(end - first, heads, dim)
        kernel.forward(queries[first:end], [(keys, values, at) for at in range(first, end)], out)
        assert out[-1].isfinite().all()

    def torchs(first: int, end: int) -> None:
        query = queries[first:end].transpose(0, 1)[None]
        out = attend(query, keys[:, :, :end].float(), values[:, :, :end].float(), first)
        assert out[:, :, -1].isfinite().all()

    return ours, torchs


def latent_parts(sizes: list[int], length: int) -> tuple[Part, Part]:
    heads, rank, rotated = sizes
    width = PLAIN_DIMS + rotated
    expand = (torch.randn(heads * 2 * PLAIN_DIMS, rank) * rank**-0.5).bfloat16()
    inner = expand.view(heads, 2 * PLAIN_DIMS, rank)[:, :PLAIN_DIMS].transpose(1, 2).reshape(-1, PLAIN_DIMS)
    latents, turned = torch.randn(1, 1, length, rank).bfloat16(), torch.randn(1, 1, length, rotated).bfloat16()
    kernel = kernels.LatentKernel(
        query=[linear(heads * width, HIDDEN)],
        compress=linear(rank + rotated, HIDDEN),
        inner=kernels.Linear.of_numbers(inner.contiguous()),
        expand=kernels.Linear.of_numbers(expand),
        output=linear(HIDDEN, heads * PLAIN_DIMS),
        query_norm=None,
        latent_norm=kernels.HeadNorm(weight=torch.ones(rank), epsilon=1e-6),
        rotated_dims=rotated,
        scaling=width**-0.5,
        rotation="halves",
        cache_dtype=torch.bfloat16,
    )
    x, queries = torch.randn(length, HIDDEN), torch.randn(1, heads, length, width)
    cos, sin = torch.ones(length, rotated), torch.zeros(length, rotated)

    def ours(first: int, end: int) -> None:
        out = torch.empty(end - first, HIDDEN)
        rooms = [(latents, turned, at) for at in range(first, end)]
        kernel.step(x[first:end], cos[first:end], sin[first:end], rooms, out)
        assert out[-1].isfinite().all()

    def torchs(first: int, end: int) -> None:
        expanded = multiply(latents[0, 0, :end].float(), expand.float()).view(1, end, heads, -1).transpose(1, 2)
        key, value = expanded.split(PLAIN_DIMS, dim=-1)
        key = torch.cat((key, turned[:, :, :end].float().expand(-1, heads, -1, -1)), -1)
        value = torch.nn.functional.pad(value, (0, rotated))
        assert attend(queries[:, :, first:end], key, value, first)[:, :, -1].isfinite().all()

    return ours, torchs


if __name__ == "__main__":
    main()
