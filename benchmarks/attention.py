"""A decode step's attention against the read bandwidth measured beside it, by context, dtype of the cache and set.

    python benchmarks/attention.py [--trials 7] [--threads 1,2] [--heads 32x4x128,16x16x128] [--latents 16x512x64]
                                   [--contexts 2048,32768] [--dtypes bf16,fp32] [--sets avx512vbmi,avx2]
                                   [--megabytes 256] [--unpinned]

Heads are QUERIESxKEYSxDIM, latents HEADSxRANKxROTATED. The projections around the attention are of 64 hidden features,
so that nearly all time is attention's. Every trial takes each contender once, in turn, over the same caches, as many as
fill the megabytes, right after a plain read of them. With one thread, time is the thread's own. GB are those of the
cache in its dtype, each read once; `us` is a step's time. The last line is one JSON document.
"""

import argparse
import os
import sys
import time
from typing import Any

import torch
from harness import finish, runnable_sets, spread
from torch import Tensor

from offload_moe.native import kernels
from offload_moe.quant import get_codec
from offload_moe.quant.layout import weight_shape

HIDDEN = 64
SETS = ("avx512vbmi", "avx2", "neon")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    options = parse_options()
    if not options.unpinned:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: max(options.threads)])
    results: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        kernels.set_threads(threads, pinned_to_cores=not options.unpinned)
        for context in options.contexts:
            for shape in options.heads:
                results += measure(options, threads, context, f"heads {shape}")
            for shape in options.latents:
                results += measure(options, threads, context, f"latents {shape}")
    finish({"benchmark": "attention", "trials": options.trials, "results": results})


def parse_options() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--heads", type=words, default=["32x4x128", "32x8x128", "16x16x128"])
    parser.add_argument("--latents", type=words, default=["16x512x64"])
    parser.add_argument("--contexts", type=numbers, default=[2048, 32768])
    parser.add_argument("--dtypes", type=words, default=["bf16", "fp32"])
    parser.add_argument("--sets", type=words, default=list(SETS))
    parser.add_argument("--megabytes", type=int, default=256, help="at least so much memory of caches")
    parser.add_argument("--unpinned", action="store_true", help="on a machine that is busy with other work")
    return parser.parse_args()


class Caches:
    """Caches of one shape and dtype, full but for one token, and the kernel that attends to them."""

    def __init__(self, what: str, context: int, dtype: torch.dtype, num_bytes: int) -> None:
        kind, shape = what.split()
        heads, *dims = map(int, shape.split("x"))
        widths = [(1, dims[0]), (1, dims[1])] if kind == "latents" else [(dims[0], dims[1])] * 2
        self.each_bytes = sum(count * width for count, width in widths) * context * dtype.itemsize
        count = max(2, -(-num_bytes // self.each_bytes))
        self.parts = [[filled(context, *width).to(dtype) for width in widths] for _ in range(count)]
        make = latent_kernel if kind == "latents" else attention_kernel
        self._kernel, self._length = make(heads, *dims, dtype), context - 1
        turned = dims[1] if kind == "latents" else 0
        self._rotary = torch.ones(max(1, turned)), torch.zeros(max(1, turned))

    def read(self) -> None:
        for parts in self.parts:
            for part in parts:
                part.view(torch.int64).sum()

    def attend(self) -> None:
        x, out = torch.ones(HIDDEN), torch.empty(HIDDEN)
        for keys, values in self.parts:
            self._kernel.step(x, *self._rotary, [(keys, values, self._length)], out)
        assert out.isfinite().all()


def filled(context: int, num_heads: int, dim: int) -> Tensor:
    return torch.randn(1, num_heads, context, dim)


def linear(out_features: int, in_features: int) -> kernels.Linear:
    codec, shape = get_codec("int8"), weight_shape(out_features, in_features)
    layout = codec.layout(shape)
    record = codec.encode(shape, {"weight": torch.randn(out_features, in_features) * in_features**-0.5})
    kernels.PanelOrder("int8", shape, layout).to_panels(record)
    return kernels.Linear(codec="int8", shape=shape, layout=layout, record=record, in_panels=True)


def attention_kernel(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> kernels.AttentionKernel:
    sizes = [(heads * dim, HIDDEN), (kv_heads * dim, HIDDEN), (kv_heads * dim, HIDDEN), (HIDDEN, heads * dim)]
    linears = [linear(*size) for size in sizes]
    return kernels.AttentionKernel(linears, head_dim=dim, rotated_dims=0, scaling=dim**-0.5, cache_dtype=dtype)


def latent_kernel(heads: int, rank: int, rotated: int, dtype: torch.dtype) -> kernels.LatentKernel:
    def numbers(out_features: int, in_features: int) -> kernels.Linear:
        return kernels.Linear.of_numbers((torch.randn(out_features, in_features) * in_features**-0.5).bfloat16())

    return kernels.LatentKernel(
        query=[linear(heads * (HIDDEN + rotated), HIDDEN)],
        compress=linear(rank + rotated, HIDDEN),
        inner=numbers(heads * rank, HIDDEN),
        expand=numbers(heads * 2 * HIDDEN, rank),
        output=linear(HIDDEN, heads * HIDDEN),
        query_norm=None,
        latent_norm=kernels.HeadNorm(weight=torch.ones(rank), epsilon=1e-6),
        rotated_dims=rotated,
        scaling=(HIDDEN + rotated) ** -0.5,
        rotation="halves",
        cache_dtype=dtype,
    )


def measure(options: argparse.Namespace, threads: int, context: int, what: str) -> list[dict[str, Any]]:
    clock = time.thread_time if threads == 1 else time.perf_counter
    names = runnable_sets(options.sets)
    caches = {dtype: Caches(what, context, DTYPES[dtype], options.megabytes << 20) for dtype in options.dtypes}
    contenders = [(dtype, name) for dtype in options.dtypes for name in names]
    reads: dict[tuple[str, str], list[float]] = {each: [] for each in contenders}
    rates: dict[tuple[str, str], list[float]] = {each: [] for each in contenders}
    for trial in range(options.trials + 1):
        for each in contenders:
            its_caches = caches[each[0]]
            kernels.select_instruction_set(each[1])
            began = clock()
            its_caches.read()
            middle = clock()
            its_caches.attend()
            ended = clock()
            if trial:
                num_bytes = its_caches.each_bytes * len(its_caches.parts) / 1e9
                reads[each].append(num_bytes / (middle - began))
                rates[each].append(num_bytes / (ended - middle))
    kernels.select_instruction_set(None)
    return [
        row(what, context, threads, each, caches[each[0]].each_bytes, reads[each], rates[each]) for each in contenders
    ]


def row(
    what: str,
    context: int,
    threads: int,
    each: tuple[str, str],
    each_bytes: int,
    reads: list[float],
    rates: list[float],
) -> dict[str, Any]:
    found = {
        "attention": what,
        "context": context,
        "threads": threads,
        "dtype": each[0],
        "set": each[1],
        "us": spread([each_bytes / rate / 1e3 for rate in rates]),
        "gb_per_s": spread(rates),
        "read_gb_per_s": spread(reads),
        "of_read": spread([rate / read for rate, read in zip(rates, reads, strict=True)]),
    }
    print(
        f"{what:20} {context:6} tokens  {threads} threads  {each[0]} {each[1]:10} {found['us']['median']:8.1f} us "
        f"{found['gb_per_s']['median']:6.2f} GB/s  {found['of_read']['median']:.2f} of read",
        file=sys.stderr,
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
