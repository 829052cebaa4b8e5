"""CPU kernels against the read bandwidth measured beside them.

    python benchmarks/kernel.py [--trials 9] [--threads 1,2] [--rows 14336] [--columns 4096] [--peers]

Every trial runs each contender once, in turn, over the same weights; medians and ratios to the median read bandwidth.
The weights are several matrices, so that none is in the cache when its turn comes. The last line is one JSON document.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from offload_moe import kernels
from offload_moe.quant import ExpertShape, Matrix, get_codec

NUM_MATRICES = 6
SETS = ("avx512vbmi", "avx512", "avx2", "neon", "portable")


def main() -> None:
    options = parse_options()
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=options.rows, in_features=options.columns),))
    records = random_records(shape)
    results: list[dict[str, object]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        kernels.set_threads(threads)
        results += measure(contenders(shape, options.peers), records, options.trials, threads)
    document = {
        "benchmark": "kernel",
        "machine": platform.processor() or platform.machine(),
        "kernel_set": kernels.instruction_set(),
        "torch": torch.__version__,
        "rows": options.rows,
        "columns": options.columns,
        "results": results,
    }
    print(json.dumps(document))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--peers", action="store_true", help="bitsandbytes' CPU gemv_4bit too (slow)")
    return parser.parse_args()


def random_records(shape: ExpertShape) -> list[torch.Tensor]:
    """One encoded matrix and copies of it, each in memory of its own."""
    matrix = shape.matrices[0]
    weight = torch.randn(matrix.out_features, matrix.in_features) * 0.02
    record = torch.zeros(get_codec("nf4").layout(shape).record_bytes, dtype=torch.uint8)
    for name, plane in kernels.encode_nf4(weight).items():
        get_codec("nf4").layout(shape).view(record, f"weight.{name}").copy_(plane)
    return [record.clone() for _ in range(NUM_MATRICES)]


def contenders(shape: ExpertShape, has_peers: bool) -> dict[str, Callable[[torch.Tensor], object]]:
    """Name -> a function that reads one record once."""
    matrix = shape.matrices[0]
    kernel = kernels.LinearKernel("nf4", [shape], [get_codec("nf4").layout(shape)])
    x = torch.randn(1, matrix.in_features)
    out = torch.empty(1, matrix.out_features)

    def gemv(name: str, mode: str) -> Callable[[torch.Tensor], object]:
        def run(record: torch.Tensor) -> None:
            kernels.select_instruction_set(name)
            kernel.forward(x, [record], [out], mode=mode)

        return run

    found: dict[str, Callable[[torch.Tensor], object]] = {"read": lambda record: record.view(torch.int64).sum()}
    for name in SETS:
        try:
            kernels.select_instruction_set(name)
        except kernels.native.ConfigError:
            continue
        if name != "portable":
            found |= {f"{name} {mode}": gemv(name, mode) for mode in ("fast", "exact")}
    kernels.select_instruction_set(None)
    if has_peers:
        found["bitsandbytes"] = bitsandbytes_gemv(shape, x)
    return found


def bitsandbytes_gemv(shape: ExpertShape, x: torch.Tensor) -> Callable[[torch.Tensor], object]:
    from bitsandbytes.functional import quantize_4bit

    matrix = shape.matrices[0]
    rows = matrix.out_features // 16  # a sixteenth: it is that slow; its record is counted in proportion
    packed, state = quantize_4bit(torch.randn(rows, matrix.in_features), blocksize=64, quant_type="nf4")
    x16 = x.bfloat16()

    def run(_: torch.Tensor) -> None:
        torch.ops.bitsandbytes.gemv_4bit(x16, packed, (rows, matrix.in_features), state.absmax, state.code, 64)

    return run


def measure(
    found: dict[str, Callable[[torch.Tensor], object]], records: list[torch.Tensor], trials: int, threads: int
) -> list[dict[str, object]]:
    seconds: dict[str, list[float]] = {name: [] for name in found}
    num_bytes = {name: records[0].numel() / (16 if name == "bitsandbytes" else 1) for name in found}
    for trial in range(trials + 1):
        for name, run in found.items():
            started = time.perf_counter()
            for record in records:
                run(record)
            if trial:
                seconds[name].append((time.perf_counter() - started) / len(records))
    rates = {name: [num_bytes[name] / s / 1e9 for s in values] for name, values in seconds.items()}
    read = statistics.median(rates["read"])
    rows: list[dict[str, object]] = []
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{threads} threads  {name:18} {median:7.2f} GB/s  {median / read:5.2f} of read  best {max(values):.2f}")
        rows.append({"threads": threads, "name": name, "gb_per_s": median, "of_read": median / read, "all": values})
    return rows


if __name__ == "__main__":
    main()
