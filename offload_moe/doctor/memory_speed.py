"""Rates of RAM, of the link to the device and back, and of the CPU kernels."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from offload_moe.doctor.check import Check, format_rate, judge
from offload_moe.native import kernels
from offload_moe.quant import ExpertShape, Matrix, get_codec

BUFFER_BYTES = 256 << 20  # larger than any processor's caches
NUM_TRIALS = 3
SLOW_MEMORY = 10e9
NARROW_LINK = 6e9  # PCIe 3.0 x16 reaches 12, 4.0 x16 25
SLOW_LOCKING = 1e9
HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 2048, 768, 48, 8  # experts of Qwen3-30B-A3B, larger than caches

Clock = Callable[[], float]


def fastest_rate(num_bytes: int, work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Bytes per second of the best of a few trials, after a warm-up."""
    work()
    best_s = float("inf")
    for _ in range(NUM_TRIALS):
        begun = clock()
        work()
        best_s = min(best_s, clock() - begun)
    return num_bytes / max(best_s, 1e-9)


def check_memory_read() -> Check:
    """Read one large buffer with all threads of torch."""
    buffer = torch.ones(BUFFER_BYTES // 4)
    rate = fastest_rate(BUFFER_BYTES, buffer.sum)
    slow = rate < SLOW_MEMORY
    fix = "Experts are computed at the speed of RAM. Use both memory channels; leave the cores free." if slow else ""
    return judge("RAM read", format_rate(rate), warning=fix, numbers={"ram_bytes_per_s": rate})


def check_kernel_paths() -> Check:
    """The code that computes experts on the CPU."""
    chosen = kernels.instruction_set()
    found = f"native, {chosen}, {kernels.num_threads()} threads"
    fix = "Only the portable C code runs here: no AVX2, AVX-512 or NEON." if chosen == "portable" else ""
    return judge("CPU kernels", found, warning=fix and f"{fix} Unset OFFLOAD_MOE_KERNEL if it is set.")


def check_kernel_speed() -> Check:
    """Bytes of records per second in decode steps over more nf4 experts than fit into the caches."""
    shape = ExpertShape(
        matrices=(
            Matrix(name="gate_up_proj", out_features=2 * INTERMEDIATE, in_features=HIDDEN),
            Matrix(name="down_proj", out_features=HIDDEN, in_features=INTERMEDIATE),
        )
    )
    codec = get_codec("nf4")
    layout = codec.layout(shape)
    weights = {name: torch.full(size, 0.01) for name, size in shape.module_shapes().items()}
    records = [codec.encode(shape, weights)]
    kernels.PanelOrder("nf4", shape, layout, has_gate=True).to_panels(records[0])
    records += [records[0].clone() for _ in range(NUM_EXPERTS - 1)]
    kernel = kernels.ExpertKernel("nf4", shape, layout, activation="silu", in_panels=True)
    x, out = torch.ones(1, HIDDEN), torch.empty(1, HIDDEN)

    def decode() -> None:
        for first in range(0, NUM_EXPERTS, TOP_K):
            chosen = records[first : first + TOP_K]
            kernel.forward(x, chosen, range(TOP_K + 1), [0] * TOP_K, [1.0 / TOP_K] * TOP_K, out)

    rate = fastest_rate(NUM_EXPERTS * layout.num_bytes, decode)
    return judge("CPU kernel speed", f"{format_rate(rate)} of nf4 experts", numbers={"kernel_bytes_per_s": rate})


def check_transfers(device: torch.device) -> list[Check]:
    """H2D and D2H copies of page-locked and of pageable memory."""
    on_device = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)
    pageable = torch.ones(BUFFER_BYTES, dtype=torch.uint8)
    begun = time.perf_counter()
    try:
        pinned = torch.ones(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return [_refused(error), *_judge_link("pageable", *_rates(pageable, on_device, device))]
    lock_rate = BUFFER_BYTES / (time.perf_counter() - begun)
    return [
        _judge_locking(lock_rate),
        *_judge_link("page-locked", *_rates(pinned, on_device, device)),
        *_judge_link("pageable", *_rates(pageable, on_device, device)),
    ]


def _rates(host: Tensor, on_device: Tensor, device: torch.device) -> tuple[float, float]:
    def copy(source: Tensor, destination: Tensor) -> None:
        destination.copy_(source, non_blocking=True)
        torch.accelerator.synchronize(device)

    h2d = fastest_rate(BUFFER_BYTES, lambda: copy(host, on_device))
    return h2d, fastest_rate(BUFFER_BYTES, lambda: copy(on_device, host))


def _judge_link(memory: str, h2d: float, d2h: float) -> list[Check]:
    key = memory.replace("-", "_")
    narrow = memory == "page-locked" and h2d < NARROW_LINK
    fix = (
        "Missed experts cross this link. Use a slot with more lanes, plug a laptop in; give more --vram to experts."
        if narrow
        else ""
    )
    return [
        judge(f"H2D, {memory}", format_rate(h2d), warning=fix, numbers={f"h2d_{key}_bytes_per_s": h2d}),
        judge(f"D2H, {memory}", format_rate(d2h), numbers={f"d2h_{key}_bytes_per_s": d2h}),
    ]


def _judge_locking(rate: float) -> Check:
    fix = (
        "The RAM arena is locked chunk by chunk at its first use, which slows the first tokens after loading."
        if rate < SLOW_LOCKING
        else ""
    )
    return judge("page-locking", f"{format_rate(rate)}", warning=fix, numbers={"lock_bytes_per_s": rate})


def _refused(error: RuntimeError) -> Check:
    reason = str(error).strip().splitlines()[0]
    return judge(
        "page-locking",
        f"refused: {reason}",
        warning="Copies go through a small staging buffer, more slowly. Raise `ulimit -l`; WSL2 and Windows lock only "
        "a part of RAM.",
    )
