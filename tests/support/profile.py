"""A trace small enough to compute every figure of its report by hand."""

import json
from typing import Any

import numpy as np

from offload_moe.profile.trace import Trace

EXPERTS = [
    [[0, 1], [2, 3]],
    [[0, 2], [2, 3]],
    [[0, 1], [0, 2]],
    [[1, 0], [2, 1]],
]
METADATA = {
    "model": "hand <made>",
    "policy": "lru",
    "num_slots": {"vram": 4, "ram": 8},
    "slot_bytes": 2**30,
    "groups": ["prose", "a < b"],
    "token_classes": {"letters": [7, 8], "number": [9]},
    "between_tokens_s": 0.02,
    "num_between_tokens": 2,
    "lookahead_recall": {"1": [None, 0.75], "2": [None, None]},
}
HIT, DELAYED, MISS = 0, 1, 2


def routing_only(repeats: int = 1) -> Trace:
    """4 tokens, 2 layers, top-2 of 4; sequences of 3 and 1."""
    experts = np.tile(np.array(EXPERTS), (repeats, 1, 1))
    return Trace(experts=experts, num_experts=4, sequence_lengths=np.array([3, 1] * repeats))


def full_trace(**changes: Any) -> Trace:
    """With two tiers; the first forward is the prompt of two tokens, its costs are absurd."""
    outcomes = np.full((4, 2, 2, 2), HIT)
    outcomes[2, 0, 1] = [MISS, HIT]
    outcomes[2, 1, 0] = [DELAYED, HIT]
    outcomes[2, 1, 1] = [MISS, MISS]
    outcomes[:2] = MISS
    absurd = [[9.0, 9.0], [9.0, 9.0]]
    values: dict[str, Any] = {
        "experts": np.array(EXPERTS),
        "num_experts": 4,
        "sequence_lengths": np.array([3, 1]),
        "router_probabilities": np.tile(np.array([[0.4, 0.3, 0.2, 0.1], [0.25] * 4]), (4, 1, 1)),
        "token_ids": np.array([7, 9, 8, 5]),
        "is_prompt": np.array([True, True, False, False]),
        "forwards": np.array([0, 0, 1, 2]),
        "tiers": ("vram", "ram"),
        "outcomes": outcomes,
        "computed_on_cpu": np.zeros((4, 2, 2), dtype=bool),
        "stall_s": np.array([absurd, [[0.01, 0.0], [0.02, 0.03]], np.zeros((2, 2))]),
        "loaded_bytes": np.array([absurd, [[100, 0], [200, 50]], np.zeros((2, 2))]).astype(int),
        "prefetch_issued": np.array([absurd, [[0, 0], [3, 1]], np.zeros((2, 2))]).astype(int),
        "prefetch_useful": np.array([absurd, [[0, 0], [1, 0]], np.zeros((2, 2))]).astype(int),
        "compute_s": np.array([[9.0, 9.0], [0.1, 0.2], [0.1, 0.2]]),
        "forward_s": np.array([99.0, 0.5, 0.4]),
        "metadata": json.dumps(METADATA),
    }
    return Trace(**{**values, **changes})
