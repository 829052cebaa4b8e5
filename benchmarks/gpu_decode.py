"""Decode on a real card at several hit rates, each way that a token can take, and rows where every expert is resident.

    python benchmarks/gpu_decode.py MODEL [--shares 0.125 0.25 0.5 1.0] [--ways queued stepwise hybrid modules]

The ways: the device pass, queued and stepwise; transformers' modules with bitsandbytes' kernels, hybrid and not. For
each share of the experts in VRAM: tokens/s, hit rate, bytes over the link per token, and the seconds that the link
takes for them at the rate measured beside it. At 100% hits nothing is moved.
Figures are measured; without a card nothing is printed but why. Last line: JSON.
"""

import argparse
import statistics
import sys
import time
from typing import Any

from harness import finish, spread

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

PROMPT = "The history of the city begins with a river, a bridge and a market. In the first century"
LINK_BYTES = 256 << 20
WAYS: dict[str, dict[str, Any]] = {  # settings of `load`
    "queued": {"device_pass": "auto"},
    "stepwise": {"device_pass": "auto"},
    "hybrid": {"device_pass": "off", "hybrid": "auto"},
    "modules": {"device_pass": "off", "hybrid": "off"},
}


def main() -> int:
    options = parse()
    import torch

    from offload_moe.memory.copier import compute_device

    device = compute_device()
    if device.type == "cpu":
        print(
            "No GPU that torch can use is here, and this benchmark measures nothing else. "
            "`benchmarks/overlap.py` runs on the simulated accelerator.",
            file=sys.stderr,
        )
        return 1
    link = link_bytes_per_s(device)
    print(f"{torch.cuda.get_device_name(device)}, link {link / 1e9:.1f} GB/s from page-locked memory")
    rows = []
    for share in options.shares:
        for way in options.ways:
            row = measure(options, device, share, way, link)
            rows.append(row)
            print(
                f"{share:6.1%} resident  {way:8}  {row['tokens_per_s']['median']:7.2f} tokens/s  "
                f"hits {row['hit_rate']:.1%}  link {row['link_s_per_token'] * 1e3:.1f} ms per token",
                flush=True,
            )
    finish({"kind": "measured", "link_bytes_per_s": link, "rows": rows, "device": torch.cuda.get_device_name(device)})
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="store, checkpoint or hub id")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--ram")
    return parser.parse_args()


def link_bytes_per_s(device: Any) -> float:
    from offload_moe.memory.arena import Arena
    from offload_moe.memory.copier import AcceleratorCopier

    copier, arena = AcceleratorCopier(device), Arena(1, LINK_BYTES)
    target, times = copier.allocate(LINK_BYTES), []
    for _ in range(6):
        began = time.perf_counter()
        copier.copy(arena.slot(0), target, after=()).wait()
        times.append(time.perf_counter() - began)
    copier.close()
    return LINK_BYTES / statistics.median(times[1:])


def measure(options: argparse.Namespace, device: Any, share: float, way: str, link: float) -> dict[str, Any]:
    """The model with that share of its experts in VRAM; the pool is shrunk to it, which needs no second load."""
    from offload_moe import load

    with load(options.model, device=str(device), ram=options.ram, **WAYS[way]) as model:
        takes_pass = choose_mode(model, way)
        pools = model.engine.hierarchy.pools
        num_slots = model.engine.hierarchy.resize("vram", int(share * pools.keys.total))
        rates, bytes_per_token = [], []
        for trial in range(options.trials + 1):
            before = model.stats.copy()
            model.generate(PROMPT, raw=True, temperature=0.0, max_new_tokens=options.tokens)
            spent = model.stats.since(before)
            if trial:
                rates.append(spent.decode_tokens_per_s)
                bytes_per_token.append(spent.h2d_bytes / max(1, spent.num_decode_tokens))
        return {
            "share_asked": share,
            "num_slots": num_slots,
            "way": way,
            "takes_device_pass": takes_pass,
            "tokens_per_s": spread(rates),
            "hit_rate": spent.hit_rate,
            "num_computed_on_cpu": spent.num_computed_on_cpu,
            "link_s_per_token": statistics.median(bytes_per_token) / link,
        }


def choose_mode(model: Any, way: str) -> bool:
    """Let all passes go that way. Returns whether decode takes the device pass."""
    from offload_moe.card.forward import CardForward

    forward = model.hf.get_decoder().forward
    if not isinstance(forward, CardForward):
        return False
    forward.plan.card.mode.mode = way
    return True


if __name__ == "__main__":
    sys.exit(main())
