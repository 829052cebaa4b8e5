"""Whether router scores help to decide what to keep: decayed use counts against decayed router probabilities.

    python benchmarks/router_scores.py TRACE.npz [--slots 25%] [--half-life 20]

The trace must hold router probabilities (`offload-moe profile --trace`). Both rank an expert by a decayed sum over the
tokens so far, in one pool: of uses, of probabilities, or of their mean. Belady and the default policy beside them.
The last line of stdout is one JSON document.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from harness import finish

from offload_moe.native.kernels import SlotTable
from offload_moe.profile.replay import parse_slots, replay
from offload_moe.profile.trace import Trace, load_trace
from offload_moe.residency.policy import DEFAULT_POLICY
from offload_moe.residency.residency import Residency


class DecayedScores:
    """Evicts the lowest decayed sum; the sums of all experts are known, resident or not."""

    name = "scores"

    def __init__(self, num_keys: int) -> None:
        self.sums = np.zeros(num_keys)
        self._resident = np.full(num_keys, np.inf)

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        pass

    def insert(self, key: int) -> None:
        self._resident[key] = 0.0

    def remove(self, key: int) -> None:
        self._resident[key] = np.inf

    def resize(self, num_slots: int) -> None:
        """Does not ask how many there are."""

    def victim(self, leased: Callable[[int], bool]) -> int | None:
        order = self.sums + self._resident
        for key in np.argsort(order).tolist():
            if order[key] == np.inf:
                return None
            if not leased(key):
                return int(key)
        return None


def hit_rate(trace: Trace, num_slots: int, half_life: float, share_of_scores: float) -> float:
    """share_of_scores: 0 sums uses, 1 sums router probabilities times top-k."""
    assert trace.router_probabilities is not None
    policy = DecayedScores(trace.keys.total)
    residency, decay, num_hits = Residency(SlotTable(trace.keys.total, num_slots), policy), 0.5 ** (1 / half_life), 0
    for token in range(trace.num_tokens):
        for layer in range(trace.num_layers):
            first = trace.keys.first(layer)
            keys = (trace.experts[token, layer].astype(int) + first).tolist()
            own = policy.sums[first : first + trace.num_experts]
            own *= decay
            own += share_of_scores * trace.top_k * trace.router_probabilities[token, layer].astype(np.float64)
            policy.sums[keys] += 1 - share_of_scores
            held = [slot for key in keys if (slot := residency.find(key)) is not None]
            num_hits += len(held)
            for slot in held:
                residency.lease(slot)
            for key in keys:
                if residency.find(key) is None and (slot := residency.admit(key)) is not None:
                    residency.lease(slot)
                    residency.loaded(slot)
                    held.append(slot)
            for slot in held:
                residency.release(slot)
    return num_hits / trace.experts.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--slots", default="25%")
    parser.add_argument("--half-life", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=400)
    options = parser.parse_args()
    trace = load_trace(options.trace).head(options.tokens)
    if trace.router_probabilities is None:
        sys.exit(f"{options.trace} holds no router probabilities: record one with `offload-moe profile --trace`.")
    num_slots = parse_slots(options.slots, trace)
    rates = {
        "uses": hit_rate(trace, num_slots, options.half_life, 0.0),
        "uses and probabilities": hit_rate(trace, num_slots, options.half_life, 0.5),
        "probabilities": hit_rate(trace, num_slots, options.half_life, 1.0),
        DEFAULT_POLICY: replay(trace, DEFAULT_POLICY, num_slots=num_slots).hit_rate,
        "belady": replay(trace, "belady", num_slots=num_slots).hit_rate,
    }
    for name, rate in rates.items():
        print(f"{name:25s} {rate:.3f}", file=sys.stderr)
    finish({"benchmark": "router_scores", "label": "simulated by replay", "slots": options.slots, "hit_rate": rates})


if __name__ == "__main__":
    main()
