"""CPU kernels against the read bandwidth measured beside them, for each codec, mode and instruction set.

    python benchmarks/kernel.py [--trials 7] [--threads 1,2] [--shapes 4096x14336 | --shapes experts] [--tokens 1,2,4,8]
                                [--codecs nf4,int8,mxfp4,bf16,Q4_K,Q6_K] [--modes fast,exact] [--sets avx512vbmi,avx2]
                                [--megabytes 256] [--unpinned] [--peers]

Codecs may be types of GGUF, which have random blocks and no exact mode; `gguf` is all of them. Shapes are
COLUMNSxROWS; `experts` are those of the matrices of Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V2-Lite and gpt-oss.
Every trial runs each contender once, in turn, over the same weights, right after a plain read of them; ratios are
taken trial by trial. The weights are several matrices, so that none is in the cache when its turn comes, in huge pages
as in the RAM arena. With one thread, time is the thread's own, so that other work on the machine takes none of it.
`fast` reads records in panels with int8 activations, `exact` records in rows with fp32 ones; `repack` is what making
panels costs a core. `cached` is the rate on a matrix that stays in the cache: what the instructions allow where memory
is no limit, and what a call costs beside. `rows_gain` is the weights times tokens per second, over those of one token
in the same trial. `error` is against fp64 on the decoded weights. The last line is one JSON document.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import finish, runnable_sets, spread
from random_blocks import random_blocks
from torch import Tensor

from offload_moe.memory.arena import Arena
from offload_moe.native import kernels
from offload_moe.quant import Codec, get_codec
from offload_moe.quant.gguf import PREFIX, TYPES, GgufCodec
from offload_moe.quant.layout import weight_shape

MIN_MATRICES = 4
MATRICES_PER_CALL = 16  # an expert's matrices are small beside the cost of a call from Python
CACHED_BYTES = 400_000
SETS = ("avx512vbmi", "avx512", "avx512vl", "avxvnni", "avx2", "neon", "portable")
EXPERTS = "2048x2048,1024x2048,2048x1536,768x2048,2048x2816,1408x2048,2880x2880,4096x28672,14336x4096"
Contender = tuple[str, str, int]  # set, mode, tokens


def main() -> None:
    options = parse_options()
    if not options.unpinned:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: max(options.threads)])
    results: list[dict[str, Any]] = []
    for shape in options.shapes:
        columns, rows = map(int, shape.split("x"))
        for codec in options.codecs:
            if codec in TYPES and not TYPES[codec].takes(columns):
                print(f"{shape:11} {codec} is left out: rows of {columns} are no whole blocks", file=sys.stderr)
                continue
            bench = CodecBench(codec, rows, columns, options)
            for threads in options.threads:
                torch.set_num_threads(threads)
                kernels.set_threads(threads, pinned_to_cores=not options.unpinned)
                results += bench.measure(options.trials, threads)
            results += bench.repack_rates(options.trials)
    if options.peers:
        results += bitsandbytes_rate(options)
    finish({"benchmark": "kernel", "trials": options.trials, "results": results})


def parse_options() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return {"experts": EXPERTS, "gguf": ",".join(TYPES)}.get(text, text).split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--shapes", type=words, default=["4096x14336"])
    parser.add_argument("--tokens", type=numbers, default=[1])
    parser.add_argument("--codecs", type=words, default=["nf4", "int8", "mxfp4", "bf16"])
    parser.add_argument("--modes", type=words, default=["fast", "exact"])
    parser.add_argument("--sets", type=words, default=list(SETS[:-1]))
    parser.add_argument("--megabytes", type=int, default=256, help="at least so much weight memory for each mode")
    parser.add_argument("--unpinned", action="store_true", help="on a machine that is busy with other work")
    parser.add_argument("--peers", action="store_true", help="bitsandbytes' CPU gemv_4bit too (slow)")
    return parser.parse_args()


class Weights:
    """A matrix in one codec and order of rows: copies of it in memory, and a piece of it that fits the cache."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, codec: str, weight: Tensor, in_panels: bool, num_bytes: int) -> None:
        self.codec, self.in_panels = codec, in_panels
        self.rows, self.columns = weight.shape
        record = self._encode(weight)
        count = max(MIN_MATRICES, -(-num_bytes // record.numel()))
        self._arena = Arena(count, record.numel(), chunk_bytes=count * record.numel())
        self.records = [self._arena.slot(index) for index in range(count)]
        for slot in self.records:
            slot[: record.numel()] = record
        (self._memory,) = self._arena.chunks_behind(0)
        self.num_bytes = count * record.numel()
        self._kernel = self._kernel_for(self.rows, min(MATRICES_PER_CALL, count))
        self._cached_rows = min(self.rows, max(16, CACHED_BYTES * self.rows // record.numel() // 16 * 16))
        self._cached_weight = weight[: self._cached_rows]
        self._cached = self._encode(self._cached_weight)
        self._cached_kernel = self._kernel_for(self._cached_rows, 1)

    def _encode(self, weight: Tensor) -> Tensor:
        shape, codec = weight_shape(*weight.shape), get_codec(self.codec)
        record = encoded(codec, weight)
        if self.in_panels:
            kernels.PanelOrder(self.codec, shape, codec.layout(shape)).to_panels(record)
        return record

    def _kernel_for(self, rows: int, count: int) -> kernels.LinearKernel:
        shape = weight_shape(rows, self.columns)
        layout = get_codec(self.codec).layout(shape)
        return kernels.LinearKernel(self.codec, [shape] * count, [layout] * count, num_parts=int(self.in_panels))

    def read_rate(self) -> float:
        began = self.clock()
        self._memory.view(torch.int64).sum()
        return self.num_bytes / (self.clock() - began) / 1e9

    def rate(self, x: Tensor) -> float:
        """GB of weights per second; the few records that fill no call are left out."""
        outs = [torch.empty(len(x), self.rows) for _ in range(min(MATRICES_PER_CALL, len(self.records)))]
        groups = [self.records[first : first + len(outs)] for first in range(0, len(self.records), len(outs))]
        whole = [group for group in groups if len(group) == len(outs)]
        began = self.clock()
        for group in whole:
            self._kernel.forward(x, group, outs)
        num_bytes = len(whole) * len(outs) * self.records[0].numel()
        return num_bytes / (self.clock() - began) / 1e9

    def cached_rate(self, x: Tensor) -> float:
        out, best = torch.empty(len(x), self._cached_rows), float("inf")
        for _ in range(30):
            began = self.clock()
            for _ in range(10):
                self._cached_kernel.forward(x, [self._cached], [out])
            best = min(best, (self.clock() - began) / 10)
        return self._cached.numel() / best / 1e9

    def error(self, x: Tensor) -> float:
        """Relative to fp64 on the decoded weights, over the piece that fits the cache."""
        shape, codec = weight_shape(self._cached_rows, self.columns), get_codec(self.codec)
        record = encoded(codec, self._cached_weight)
        weight = codec.decode(shape, record, torch.float32)["weight"].double()
        expected, out = x.double() @ weight.T, torch.empty(len(x), self._cached_rows)
        self._cached_kernel.forward(x, [self._cached], [out])
        return float((out - expected).norm() / expected.norm())


def encoded(codec: Codec, weight: Tensor) -> Tensor:
    """The record of a weight in rows; of a type of GGUF, one of random blocks of that shape."""
    shape = weight_shape(*weight.shape)
    if isinstance(codec, GgufCodec):
        return codec.encode(shape, {"weight.codes": random_blocks(codec.kinds[0], *weight.shape)})
    return kernels.fast_encoding(codec).encode(shape, {"weight": weight})


class CodecBench:
    """The contenders over one matrix in one codec."""

    def __init__(self, codec: str, rows: int, columns: int, options: argparse.Namespace) -> None:
        weight, num_bytes = torch.randn(rows, columns) * 0.02, options.megabytes << 20
        self._shape = f"{columns}x{rows}"
        self._label = codec
        self._codec = f"{PREFIX}{codec}" if codec in TYPES else codec
        modes = [mode for mode in options.modes if (codec != "bf16" or mode == "exact") and self._has(mode)]
        self._in_rows = Weights(self._codec, weight, False, num_bytes) if self._has("exact") else None
        self._in_panels = Weights(self._codec, weight, True, num_bytes) if "fast" in modes else None
        self._inputs = {count: torch.randn(count, columns) for count in options.tokens}
        sets = runnable_sets(options.sets)
        self._contenders = [(name, mode, count) for mode in modes for name in sets for count in options.tokens]

    def measure(self, num_trials: int, threads: int) -> list[dict[str, Any]]:
        Weights.clock = staticmethod(time.thread_time if threads == 1 else time.perf_counter)
        reads: dict[Contender, list[float]] = {each: [] for each in self._contenders}
        rates: dict[Contender, list[float]] = {each: [] for each in self._contenders}
        for trial in range(num_trials + 1):
            for each in self._contenders:
                plain = self._in_rows or self._in_panels
                assert plain is not None
                read, rate = plain.read_rate(), self._run(each, Weights.rate)
                if trial:
                    reads[each].append(read)
                    rates[each].append(rate)
        return [self._row(each, threads, reads[each], rates) for each in self._contenders]

    def _has(self, mode: str) -> bool:
        return mode == "fast" or kernels.not_in_rows_reason(self._codec) is None

    def _run(self, each: Contender, measure: Callable[[Weights, Tensor], float]) -> float:
        name, mode, count = each
        kernels.select_instruction_set(name)
        weights = self._in_panels if mode == "fast" else self._in_rows
        assert weights is not None
        return measure(weights, self._inputs[count])

    def _row(
        self, each: Contender, threads: int, reads: list[float], all_rates: dict[Contender, list[float]]
    ) -> dict[str, Any]:
        (name, mode, count), rates = each, all_rates[each]
        single = all_rates.get((name, mode, 1), rates)
        row = {
            "codec": self._codec,
            "shape": self._shape,
            "set": name,
            "mode": mode,
            "tokens": count,
            "threads": threads,
            "gb_per_s": spread(rates),
            "read_gb_per_s": spread(reads),
            "of_read": spread([rate / read for rate, read in zip(rates, reads, strict=True)]),
            "rows_gain": spread([count * rate / one for rate, one in zip(rates, single, strict=True)]),
            "cached_gb_per_s": self._run(each, Weights.cached_rate),
            "error": self._run(each, Weights.error),
        }
        kernels.select_instruction_set(None)
        of_read = row["of_read"]
        print(
            f"{self._shape:11} {threads} threads  {self._label:6} {name:10} {mode:6} {count} tokens "
            f"{row['gb_per_s']['median']:6.2f} GB/s  {of_read['median']:.2f} of read ({of_read['min']:.2f} to "
            f"{of_read['max']:.2f})  x{row['rows_gain']['median']:.2f}  cached {row['cached_gb_per_s']:6.2f}  "
            f"error {row['error']:.1e}",
            file=sys.stderr,
            flush=True,
        )
        return row

    def repack_rates(self, num_trials: int) -> list[dict[str, Any]]:
        """GB per second that one thread repacks in place, there and back."""
        if self._in_panels is None or (self._label in TYPES and TYPES[self._label].is_plain):
            return []
        weights, rates = self._in_panels, {"to_rows": list[float](), "to_panels": list[float]()}
        shape = weight_shape(weights.rows, weights.columns)
        order = kernels.PanelOrder(self._codec, shape, get_codec(self._codec).layout(shape))
        for _ in range(num_trials):
            for name, repack in (("to_rows", order.to_rows), ("to_panels", order.to_panels)):
                began = time.thread_time()
                for record in weights.records:
                    repack(record)
                rates[name].append(weights.num_bytes / (time.thread_time() - began) / 1e9)
        row = {name: spread(values) for name, values in rates.items()}
        print(
            f"{self._shape:11} repack  {self._label:6} to panels {row['to_panels']['median']:.2f} GB/s, "
            f"to rows {row['to_rows']['median']:.2f}",
            file=sys.stderr,
            flush=True,
        )
        return [{"codec": self._codec, "shape": self._shape, "repack_gb_per_s": row}]


def bitsandbytes_rate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """bitsandbytes' gemv_4bit on a sixteenth of the rows: it is that slow."""
    from bitsandbytes.functional import quantize_4bit

    columns, rows = map(int, options.shapes[0].split("x"))
    rows //= 16
    packed, state = quantize_4bit(torch.randn(rows, columns), blocksize=64, quant_type="nf4")
    x = torch.randn(1, columns).bfloat16()
    rates = []
    for _ in range(options.trials):
        began = time.perf_counter()
        torch.ops.bitsandbytes.gemv_4bit(x, packed, (rows, columns), state.absmax, state.code, 64)
        rates.append(packed.numel() / (time.perf_counter() - began) / 1e9)
    return [{"codec": "nf4", "set": "bitsandbytes", "threads": torch.get_num_threads(), "gb_per_s": spread(rates)}]


if __name__ == "__main__":
    main()
