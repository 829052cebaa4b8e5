"""Do copies hide behind compute? Simulated link, real CPU compute, against the bounds that no scheduler can beat.

    python benchmarks/overlap.py [--rates 1 2 4 8 16 25] [--tokens N] [--trials N] [--threads N]
        [--hidden N --intermediate N]

A random model with a dominant residual stream (so that routers can be asked ahead) runs its experts with the native
kernel out of the memory of a simulated accelerator. The link takes bytes / rate for a record, moves none and needs no
thread: a real one does not use the CPU. A: seconds of a layer outside its experts, E: of its experts, both measured
with every expert resident, taking turns token by token with the others; X: missed bytes / rate.

Lookahead off is compared with the sum over layers of A + max(E, X); lookahead on with an event replay fed with the
copies that were really asked for, in their order; prompts with max(all compute, all transfer). `saved_in_parts` is
the share of a token that the replay would save, lookahead off, if each matrix were computed as it arrives.
Figures are simulated. Last line: JSON with, per rate, `off`, `on`, `gap_closed`, `recall`, `prompt`, `prompt_off`, and
the rate where compute equals transfer.
"""

import argparse
import copy
import ctypes
import dataclasses
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import finish, pin_threads
from overlap_link import AlwaysOn, SameRecord, silent_link

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

LAYERS, EXPERTS, TOP_K = 6, 32, 8
SHARE_RESIDENT = 0.375
MATRICES = 3  # of an expert: parts that could be computed one by one
PROMPT_TOKENS = 48
PROMPT_TRIALS = 3
LEAST_GAP = 0.05  # of a token's time, between what lookahead could save and nothing: below it there is no gap to close
PR_SET_TIMERSLACK = 29  # sys/prctl.h
DAMPING = 0.02  # of what layers add to the residual stream


def main() -> None:
    options = parse()
    if options.pinned:
        pin_threads(options.threads)
    import torch

    from offload_moe.native import kernels

    wake_on_time()
    torch.set_num_threads(options.threads)
    kernels.set_threads(options.threads, pinned_to_cores=options.pinned)
    model = random_model(options.hidden, options.intermediate)
    rows = [measure(model, rate, options) for rate in options.rates]
    crossing = statistics.median(row["rate_of_balance_gb_per_s"] for row in rows)
    print(f"compute equals transfer at {crossing:.2f} GB/s")
    finish(
        {"kind": "simulated", "rates": rows, "compute_equals_transfer_gb_per_s": crossing, "threads": options.threads}
    )


def wake_on_time() -> None:
    """Linux lets a sleep last up to 50 us longer than asked for, and a simulated copy would be noticed that late."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4, 8, 16, 25], help="GB/s")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="leave a core to the link: a real one needs none")
    parser.add_argument("--pinned", action="store_true", help="on a machine that nothing else uses")
    parser.add_argument("--hidden", type=int, default=2048, help="experts are as large as OLMoE's")
    parser.add_argument("--intermediate", type=int, default=1024)
    return parser.parse_args()


@dataclass
class RandomModel:
    """The dense part, and the one record that serves as every expert."""

    hf: Any
    layers: list[Any]
    record: Any


def random_model(hidden: int, intermediate: int) -> RandomModel:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from offload_moe.checkpoint.experts import find_experts
    from offload_moe.experts.attach import detach_parameters
    from offload_moe.quant import get_codec

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        norm_topk_prob=True,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    layers = find_experts(model)
    shapes = layers[0].shape.module_shapes()
    tensors = {
        name: torch.randn(shape[-2:]) * 0.03 * (DAMPING if "down" in name else 1) for name, shape in shapes.items()
    }
    record = get_codec("nf4").encode(layers[0].shape, tensors)
    detach_parameters(layers)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for name, weight in model.named_parameters():
        scale = DAMPING if "o_proj" in name else 30.0 if "embed" in name or "gate" in name else 1.0
        weight.normal_(std=0.03 * scale) if weight.dim() > 1 else weight.fill_(1.0)
    return RandomModel(hf=model, layers=layers, record=record)


@dataclass
class Layer:
    """What happened at one acquire, and when."""

    begin: float
    num_resident: int = 0
    demands: list[int] = field(default_factory=list)
    arriving: list[int] = field(default_factory=list)
    prefetches: list[int] = field(default_factory=list)
    end: float = 0.0


class Rig:
    """The model attached to a hierarchy over a simulated link; notes what is asked for and when."""

    def __init__(self, model: RandomModel, bytes_per_s: float, share: float, depth: int) -> None:

        import torch

        from offload_moe.experts.arithmetic import choose_arithmetic
        from offload_moe.experts.attach import BoundExperts, attach
        from offload_moe.experts.lookahead import Lookahead
        from offload_moe.experts.probe import find_probes
        from offload_moe.quant import get_codec
        from offload_moe.residency.hierarchy import Hierarchy, Pools
        from offload_moe.residency.keys import ExpertKeys

        codec = get_codec("nf4")
        self.hf = copy.deepcopy(model.hf)
        self.record = model.record
        layers = [dataclasses.replace(layer, module=self.hf.get_submodule(layer.name)) for layer in model.layers]
        self.copier = silent_link(bytes_per_s)
        num_records = LAYERS * EXPERTS
        pools = Pools(
            keys=ExpertKeys([EXPERTS] * LAYERS),
            slot_bytes=self.record.numel(),
            num_ram_slots=num_records,
            num_device_slots=int(num_records * share),
        )
        self.hierarchy = Hierarchy(pools, lambda arena, _: SameRecord(arena, self.record), self.copier)
        self.scheduler = self.hierarchy.scheduler
        for slot in range(self.scheduler.residency.num_slots):  # what the link would bring, for it brings nothing
            self.hierarchy.record_of(slot)[: self.record.numel()] = self.record
        for layer in range(LAYERS):
            with self.hierarchy.ram.acquire(layer, range(EXPERTS)) as lease:
                for _ in lease:
                    pass
        lookahead = None
        self._foretold: dict[int, Any] = {}
        if depth:
            probes = [self.noting(ordinal, probe) for ordinal, probe in enumerate(find_probes(self.hf, layers))]
            lookahead = Lookahead(probes, self.scheduler, AlwaysOn(), depth)
        bound = [
            BoundExperts(
                ordinal,
                EXPERTS,
                self.scheduler,
                self.hierarchy.record_of,
                choose_arithmetic(layer.contract, layer.shape, codec, torch.device("cpu")),
                lookahead,
            )
            for ordinal, layer in enumerate(layers)
        ]
        attach(layers, bound)
        self.layers: list[Layer] = []
        self.num_foretold = self.num_routed = 0
        for experts in bound:
            experts.recorder = self
        self.scheduler.observer = self
        self._start = self.scheduler.mover.start
        self.scheduler.mover.start = self.note_start

    def begin(self, layer: int, top_k_index: Any, top_k_weights: Any) -> None:
        self.layers.append(Layer(begin=time.perf_counter()))
        if (foretold := self._foretold.pop(layer, None)) is not None:
            routed = set(top_k_index.flatten().tolist())
            self.num_routed += len(routed)
            self.num_foretold += len(routed & set(foretold.flatten().tolist()))

    def end(self) -> None:
        self.layers[-1].end = time.perf_counter()

    def noting(self, layer: int, probe: Any) -> Any:
        """The probe; what it foretold last is what the layer is compared with."""
        route = probe.route

        def noted(residual: Any, num_experts_per_token: int) -> Any:
            self._foretold[layer] = route(residual, num_experts_per_token)
            return self._foretold[layer]

        probe.route = noted
        return probe

    def acquired(self, layer: int, arriving: Sequence[int], missing: Sequence[int]) -> None:
        self.layers[-1].arriving = [layer * EXPERTS + expert for expert in arriving]
        self.layers[-1].demands = [layer * EXPERTS + expert for expert in missing]

    def prefetched(self, layer: int, num_started: int) -> None: ...

    def computed_on_cpu(self, layer: int, experts: Sequence[int]) -> None: ...

    def note_start(self, key: int, slot: int, arrived: Any, *, is_prefetch: bool = False) -> None:
        if is_prefetch:
            self.layers[-1].prefetches.append(key)
        self._start(key, slot, arrived, is_prefetch=is_prefetch)

    def read(self, ids: Sequence[int]) -> None:
        """Begin a conversation; the notes are of what follows."""
        self._cache = self._forward(ids, None)
        self.layers = []

    def step(self, token: int) -> float:
        """Seconds of one token."""
        began = time.perf_counter()
        self._cache = self._forward([token], self._cache)
        return time.perf_counter() - began

    def _forward(self, ids: Sequence[int], cache: Any) -> Any:
        import torch

        from offload_moe.families.cache_name import cache_from, with_cache

        with torch.inference_mode():
            return cache_from(self.hf(input_ids=torch.tensor([ids]), **with_cache(cache), use_cache=True))

    def prompt(self, ids: Sequence[int]) -> float:
        self.layers = []
        began = time.perf_counter()
        self._forward(ids, None)
        return time.perf_counter() - began

    def close(self) -> None:
        self.hierarchy.close()


def decode(rigs: dict[str, Rig], ids: Sequence[int]) -> dict[str, float]:
    """Seconds of the tokens in each rig, which take turns token by token: so the machine is the same for all."""
    for rig in rigs.values():
        rig.read(ids[:4])
    seconds = dict.fromkeys(rigs, 0.0)
    for token in ids[4:]:
        for name, rig in rigs.items():
            seconds[name] += rig.step(token)
    return seconds


def measure(model: RandomModel, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one link rate, in GB/s."""
    bytes_per_s = rate * 1e9
    draw = random.Random(1)
    ids = [draw.randrange(512) for _ in range(4 + options.tokens)]
    prompt = [draw.randrange(512) for _ in range(PROMPT_TOKENS)]
    rigs = {
        "resident": Rig(model, 1e12, 1.0, 0),
        "off": Rig(model, bytes_per_s, SHARE_RESIDENT, 0),
        "on": Rig(model, bytes_per_s, SHARE_RESIDENT, 2),
    }
    decode(rigs, ids)
    transfer = rigs["off"].record.numel() / bytes_per_s
    values: dict[str, list[float]] = {
        name: [] for name in ("off", "on", "gap", "prompt", "prompt_off", "recall", "balance", "parts")
    }
    for trial in range(options.trials):
        taken = decode(rigs, ids)
        resident_s, off_s = taken["resident"], taken["off"]
        outside, inside = shares(rigs["resident"].layers, resident_s)
        for name in ("off", "on"):
            seconds, layers = taken[name], rigs[name].layers
            misses = sum(len(layer.demands) for layer in layers)
            brought = misses + sum(len(layer.prefetches) for layer in layers)
            bound = sum(outside + max(inside, transfer * len(layer.demands)) for layer in layers)
            if name == "off":
                values["off"].append(seconds / bound)
                in_parts = replay(layers, outside, inside, transfer, MATRICES)
                values["parts"].append(1 - in_parts / replay(layers, outside, inside, transfer))
                values["balance"].append(misses * rigs["off"].record.numel() / resident_s / 1e9)
            else:
                values["on"].append(seconds / replay(layers, outside, inside, transfer))
                least = max(resident_s, transfer * brought)
                if off_s - least > LEAST_GAP * off_s:
                    values["gap"].append((off_s - seconds) / (off_s - least))
                values["recall"].append(rigs["on"].num_foretold / max(1, rigs["on"].num_routed))
        if trial >= PROMPT_TRIALS:
            continue
        resident_s = rigs["resident"].prompt(prompt)
        for name, column in (("on", "prompt"), ("off", "prompt_off")):
            seconds = rigs[name].prompt(prompt)
            copies = sum(len(layer.demands) + len(layer.prefetches) for layer in rigs[name].layers)
            values[column].append(seconds / max(resident_s, transfer * copies))
    for rig in rigs.values():
        rig.close()
    row = {name: statistics.median(figures) if figures else math.nan for name, figures in values.items()}
    print(
        f"{rate:5.1f} GB/s  off {row['off']:.2f}  on {row['on']:.2f}  gap closed {row['gap']:.2f} "
        f"(recall {row['recall']:.2f})  prompt {row['prompt']:.2f}, off {row['prompt_off']:.2f}  "
        f"saved in parts {max(0.0, row['parts']):.1%}",
        flush=True,
    )
    return {
        "gb_per_s": rate,
        "off": row["off"],
        "on": row["on"],
        "gap_closed": row["gap"] if values["gap"] else None,
        "recall": row["recall"],
        "prompt": row["prompt"],
        "prompt_off": row["prompt_off"],
        "saved_in_parts": row["parts"],
        "rate_of_balance_gb_per_s": row["balance"],
        "spread": {name: [min(figures), max(figures)] for name, figures in values.items() if figures},
    }


def shares(layers: Sequence[Layer], total_s: float) -> tuple[float, float]:
    """Median seconds of a layer's experts, and what is left of the total for each layer outside them."""
    inside = statistics.median(layer.end - layer.begin for layer in layers)
    return max(0.0, total_s / len(layers) - inside), inside


def replay(layers: Sequence[Layer], outside: float, inside: float, transfer: float, num_parts: int = 1) -> float:
    """Seconds if nothing cost anything but compute and the link: demands go first, prefetches fill the gaps in order.

    A copy that has begun is not interrupted. A layer's experts are computed as they arrive, those that are here first.
    num_parts: equal parts of a record, each of which is computed as it arrives, for nothing more.
    """
    now = link_free = 0.0
    waiting: dict[int, float] = {}  # prefetches that have not begun, and when they were asked for
    arrives: dict[int, float] = {}
    for layer in layers:
        now += outside
        while waiting and link_free < now:
            key = next(iter(waiting))
            link_free = max(link_free, waiting.pop(key)) + transfer
            arrives[key] = link_free
        link_free = max(link_free, now)
        for key in [*(key for key in layer.arriving if key in waiting), *layer.demands]:
            waiting.pop(key, None)
            link_free += transfer
            arrives[key] = link_free
        waiting |= dict.fromkeys(layer.prefetches, now)
        needed = sorted(arrives.get(key, now) for key in (*layer.arriving, *layer.demands))
        each = inside / TOP_K
        now += each * (TOP_K - len(needed))
        for arrival in needed:
            for later in reversed(range(num_parts)):  # parts that are still to come
                now = max(now, arrival - later * transfer / num_parts) + each / num_parts
    return now


if __name__ == "__main__":
    main()
