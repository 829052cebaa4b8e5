"""What the scheduler costs per MoE layer when nothing has to be moved: the ids to the host, grouping, lease, release.

    python benchmarks/scheduler.py [--layers N] [--experts N] [--top-k K] [--trials N] [--device cuda]

One thread, OLMoE's routing by default (16 layers of 64 experts, top-8), every expert resident, no arithmetic at all.
The device tier is simulated unless a device is named; there a transfer of the ids crosses the link and events are real.
Last line: JSON with `us_per_layer` of each tier and the goal of 50.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from harness import alternate, finish, pin_threads, spread

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

GOAL_US = 50.0
SLOT_BYTES = 4096
NUM_TOKENS = 200


def main() -> None:
    options = parse()
    if options.device is None:
        pin_threads(1)
    import torch

    torch.set_num_threads(1)
    device = torch.device(options.device or "cpu")
    ids = [
        torch.rand(1, options.experts).topk(options.top_k).indices.to(device)
        for _ in range(NUM_TOKENS * options.layers)
    ]
    name = f"device tier ({device})" if options.device else "device tier (simulated)"
    candidates = {
        "RAM tier": layer_us(make(options, None), ids, options),
        name: layer_us(make(options, make_copier(options.device)), ids, options),
        "ids and grouping alone": grouping_us(ids, options.experts),
    }
    values = alternate(candidates, num_trials=options.trials, num_warmups=2)
    result = {tier: spread(figures) for tier, figures in values.items()}
    for tier, figures in result.items():
        print(f"{tier:28} {figures['median']:6.1f} us per layer ({figures['min']:.1f} to {figures['max']:.1f})")
    finish({"us_per_layer": result, "goal_us": GOAL_US, "kind": "measured", "top_k": options.top_k})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--device")
    return parser.parse_args()


def make_copier(device: str | None) -> Any:
    from offload_moe.memory.copier import AcceleratorCopier, compute_device
    from offload_moe.memory.simulated import SimulatedCopier

    return AcceleratorCopier(compute_device(device)) if device else SimulatedCopier(latency_s=0)


def make(options: argparse.Namespace, copier: Any) -> Any:
    """A hierarchy with every expert resident in its fast tier."""
    from offload_moe.residency.hierarchy import Hierarchy, Pools
    from offload_moe.residency.keys import ExpertKeys

    num_records = options.layers * options.experts
    pools = Pools(
        keys=ExpertKeys([options.experts] * options.layers),
        slot_bytes=SLOT_BYTES,
        num_ram_slots=num_records,
        num_device_slots=num_records if copier else 0,
    )
    hierarchy = Hierarchy(pools, lambda arena, _: InstantMover(), copier)
    for layer in range(options.layers):
        with hierarchy.scheduler.acquire(layer, range(options.experts)) as lease:
            for _ in lease:
                pass
    return hierarchy


class InstantMover:
    """Fills RAM slots with whatever lies there, from a thread as the protocol has it."""

    def __init__(self) -> None:
        from offload_moe.memory.workers import TransferWorkers

        self._workers = TransferWorkers(1, "instant")

    def start(self, key: int, slot: int, arrived: Callable[..., None], *, is_prefetch: bool = False) -> None:
        self._workers.submit(slot, lambda: arrived(slot, SLOT_BYTES, None), is_prefetch=is_prefetch)

    def promote(self, slot: int) -> None:
        self._workers.promote(slot)

    def drain(self) -> None:
        pass

    def used(self, slots: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        self._workers.close()


def layer_us(hierarchy: Any, ids: Any, options: argparse.Namespace) -> Callable[[], float]:
    from offload_moe.experts.routing import group_by_expert

    scheduler, record_of = hierarchy.scheduler, hierarchy.record_of

    def run() -> float:
        times = []
        for token in range(NUM_TOKENS):
            began = time.perf_counter()
            for layer in range(options.layers):
                routing = group_by_expert(ids[token * options.layers + layer], options.experts)
                with scheduler.acquire(layer, routing.experts) as lease:
                    for wave in lease:
                        for _, slot in wave:
                            record_of(slot)
            times.append((time.perf_counter() - began) / options.layers)
        assert scheduler.counters.num_evictions == 0
        return 1e6 * statistics.median(times)

    return run


def grouping_us(ids: Any, num_experts: int) -> Callable[[], float]:
    from offload_moe.experts.routing import group_by_expert

    def run() -> float:
        began = time.perf_counter()
        for one in ids:
            group_by_expert(one, num_experts)
        return 1e6 * (time.perf_counter() - began) / len(ids)

    return run


if __name__ == "__main__":
    main()
