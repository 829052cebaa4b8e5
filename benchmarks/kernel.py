"""CPU kernels against the read bandwidth measured beside them, for each codec, mode and instruction set.

    python benchmarks/kernel.py [--trials 7] [--threads 1,2] [--rows 14336] [--columns 4096] [--tokens 1]
                                [--codecs nf4,int8,mxfp4,bf16] [--unpinned] [--peers]

Every trial runs each contender once, in turn, over the same weights, right after a plain read of them; ratios are
taken trial by trial. The weights are several matrices, so that none is in the cache when its turn comes, in huge pages
as in the RAM arena. `cached` is the rate on a matrix that stays in the cache: what the instructions allow where memory
is no limit. `error` is against fp64 on the decoded weights. The last line is one JSON document.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import finish, spread
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.memory.arena import Arena
from offload_moe.native import kernels
from offload_moe.quant import ExpertShape, Matrix, get_codec

NUM_MATRICES = 4
CACHED_BYTES = 400_000
SETS = ("avx512vbmi", "avx512", "avx2", "neon")
MODES = ("fast", "exact")


def main() -> None:
    options = parse_options()
    if not options.unpinned:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: max(options.threads)])
    results: list[dict[str, Any]] = []
    for codec in options.codecs:
        bench = CodecBench(codec, options.rows, options.columns, options.tokens)
        for threads in options.threads:
            torch.set_num_threads(threads)
            kernels.set_threads(threads, pinned_to_cores=not options.unpinned)
            results += bench.measure(options.trials, threads)
    if options.peers:
        results += bitsandbytes_rate(options)
    names = ("rows", "columns", "tokens", "trials")
    finish({"benchmark": "kernel", **{name: getattr(options, name) for name in names}, "results": results})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--codecs", type=lambda text: text.split(","), default=["nf4", "int8", "mxfp4", "bf16"])
    parser.add_argument("--unpinned", action="store_true", help="on a machine that is busy with other work")
    parser.add_argument("--peers", action="store_true", help="bitsandbytes' CPU gemv_4bit too (slow)")
    return parser.parse_args()


def runnable_sets() -> list[str]:
    found = []
    for name in SETS:
        try:
            kernels.select_instruction_set(name)
        except ConfigError:
            continue
        found.append(name)
    kernels.select_instruction_set(None)
    return found


class CodecBench:
    """A matrix in one codec: copies of it in memory, and a piece of it that fits the cache."""

    def __init__(self, codec: str, rows: int, columns: int, num_tokens: int) -> None:
        self._codec, self._rows, self._columns = codec, rows, columns
        self._x = torch.randn(num_tokens, columns)
        self._weight = torch.randn(rows, columns) * 0.02
        self._kernel, record = self._encode(self._weight)
        self._arena = Arena(NUM_MATRICES, record.numel())
        self._records = [self._arena.slot(index) for index in range(NUM_MATRICES)]
        for slot in self._records:
            slot[: record.numel()] = record
        self._cached_rows = min(rows, max(8, CACHED_BYTES * rows // record.numel()))
        self._cached_kernel, self._cached = self._encode(self._weight[: self._cached_rows])

    def _encode(self, weight: Tensor) -> tuple[kernels.LinearKernel, Tensor]:
        matrix = Matrix(name="weight", out_features=weight.shape[0], in_features=weight.shape[1])
        shape = ExpertShape(matrices=(matrix,))
        codec = kernels.fast_encoding(get_codec(self._codec))
        return kernels.LinearKernel(self._codec, [shape], [codec.layout(shape)]), codec.encode(
            shape, {"weight": weight}
        )

    def measure(self, num_trials: int, threads: int) -> list[dict[str, Any]]:
        modes = MODES if self._codec != "bf16" else ("exact",)
        contenders = [(name, mode) for name in runnable_sets() for mode in modes]
        reads: dict[tuple[str, str], list[float]] = {each: [] for each in contenders}
        rates: dict[tuple[str, str], list[float]] = {each: [] for each in contenders}
        for trial in range(num_trials + 1):
            for each in contenders:
                read = self._rate(lambda record: record.view(torch.int64).sum())
                rate = self._rate(self._forward(*each))
                if trial:
                    reads[each].append(read)
                    rates[each].append(rate)
        return [self._row(each, threads, reads[each], rates[each]) for each in contenders]

    def _forward(self, name: str, mode: str) -> Callable[[Tensor], object]:
        out = torch.empty(len(self._x), self._rows)

        def run(record: Tensor) -> None:
            kernels.select_instruction_set(name)
            self._kernel.forward(self._x, [record], [out], mode=mode)

        return run

    def _rate(self, run: Callable[[Tensor], object]) -> float:
        began = time.perf_counter()
        for record in self._records:
            run(record)
        return len(self._records) * self._records[0].numel() / (time.perf_counter() - began) / 1e9

    def _cached_rate(self, name: str, mode: str) -> float:
        kernels.select_instruction_set(name)
        out = torch.empty(len(self._x), self._cached_rows)
        best = float("inf")
        for _ in range(30):
            began = time.perf_counter()
            for _ in range(10):
                self._cached_kernel.forward(self._x, [self._cached], [out], mode=mode)
            best = min(best, (time.perf_counter() - began) / 10)
        return self._cached.numel() / best / 1e9

    def _error(self, name: str, mode: str) -> float:
        """Relative to fp64 on the decoded weights, over the piece that fits the cache."""
        kernels.select_instruction_set(name)
        shape = ExpertShape(
            matrices=(Matrix(name="weight", out_features=self._cached_rows, in_features=self._columns),)
        )
        weight = get_codec(self._codec).decode(shape, self._cached, torch.float32)["weight"].double()
        expected, out = self._x.double() @ weight.T, torch.empty(len(self._x), self._cached_rows)
        self._cached_kernel.forward(self._x, [self._cached], [out], mode=mode)
        return float((out - expected).norm() / expected.norm())

    def _row(self, each: tuple[str, str], threads: int, reads: list[float], rates: list[float]) -> dict[str, Any]:
        name, mode = each
        row = {
            "codec": self._codec,
            "set": name,
            "mode": mode,
            "threads": threads,
            "gb_per_s": spread(rates),
            "read_gb_per_s": spread(reads),
            "of_read": spread([rate / read for rate, read in zip(rates, reads, strict=True)]),
            "cached_gb_per_s": self._cached_rate(name, mode),
            "error": self._error(name, mode),
        }
        kernels.select_instruction_set(None)
        of_read = row["of_read"]
        print(
            f"{threads} threads  {self._codec:5} {name:10} {mode:5} {row['gb_per_s']['median']:6.2f} GB/s  "
            f"{of_read['median']:.2f} of read ({of_read['min']:.2f} to {of_read['max']:.2f})  "
            f"cached {row['cached_gb_per_s']:6.2f}  error {row['error']:.1e}",
            file=sys.stderr,
            flush=True,
        )
        return row


def bitsandbytes_rate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """bitsandbytes' gemv_4bit on a sixteenth of the rows: it is that slow."""
    from bitsandbytes.functional import quantize_4bit

    rows = options.rows // 16
    packed, state = quantize_4bit(torch.randn(rows, options.columns), blocksize=64, quant_type="nf4")
    x = torch.randn(1, options.columns).bfloat16()
    rates = []
    for _ in range(options.trials):
        began = time.perf_counter()
        torch.ops.bitsandbytes.gemv_4bit(x, packed, (rows, options.columns), state.absmax, state.code, 64)
        rates.append(packed.numel() / (time.perf_counter() - began) / 1e9)
    return [{"codec": "nf4", "set": "bitsandbytes", "threads": torch.get_num_threads(), "gb_per_s": spread(rates)}]


if __name__ == "__main__":
    main()
