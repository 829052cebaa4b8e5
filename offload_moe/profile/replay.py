"""Replay a routing trace through the runtime's own residency and policies, without a model.

A token's top-k of a layer are acquired together: experts that are resident then are hits; all of them stay leased
while the misses load; then the next layer follows. Loads complete at once: no delayed hits and no prefetch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from offload_moe.errors import ConfigError
from offload_moe.native.slot_table import SlotTable
from offload_moe.profile.belady import Belady
from offload_moe.profile.trace import Trace
from offload_moe.residency.policy import Policy, make_policy
from offload_moe.residency.residency import Residency

Pool = Literal["layer", "global"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """The result of one policy on a trace, from a cold start."""

    policy: str
    pool: Pool
    num_slots: int  # in all layers together
    num_tokens: int
    num_accesses: int
    num_hits: int
    num_evictions: int
    hit_rate_per_layer: tuple[float, ...]

    @property
    def hit_rate(self) -> float:
        """Share of routed experts that were resident at acquire, 0 to 1."""
        return self.num_hits / self.num_accesses


def parse_slots(slots: str | int, trace: Trace) -> int:
    """Slots in all layers together: a number, or a share of all experts as in "25%".

    Raises: ConfigError when it is neither, or not at least one slot.
    """
    num_all = trace.keys.total
    text = str(slots).strip()
    try:
        num_slots = math.floor(float(text[:-1]) / 100 * num_all) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        raise ConfigError(f"Slots {slots!r} is neither a number nor a percentage such as 25%.") from None
    if num_slots < 1:
        raise ConfigError(f"Slots {slots!r} is {num_slots} of {num_all} experts. At least one slot is needed.")
    return min(num_slots, num_all)


def replay(trace: Trace, policy: str, *, num_slots: int, pool: Pool = "global") -> ReplayResult:
    """Run one policy, or "belady", over a trace.

    num_slots: in all layers together; a per-layer pool divides them evenly, with the remainder in the first layers.

    Raises: ConfigError for an unknown policy, or a per-layer pool with fewer slots than layers.
    """
    residencies = _pools(trace, policy, num_slots, pool)
    first_keys = np.array([[trace.keys.first(layer)] for layer in range(trace.num_layers)])
    hits = [0] * trace.num_layers
    for token in range(trace.num_tokens):
        keys_per_layer = (trace.experts[token] + first_keys).tolist()
        weights_per_layer = None if trace.weights is None else trace.weights[token].tolist()
        for layer, keys in enumerate(keys_per_layer):
            weights = None if weights_per_layer is None else weights_per_layer[layer]
            residencies[layer].policy.access(layer, keys, weights)
            hits[layer] += acquire(residencies[layer], keys)
    per_layer = trace.num_tokens * trace.top_k
    return ReplayResult(
        policy=policy,
        pool=pool,
        num_slots=num_slots,
        num_tokens=trace.num_tokens,
        num_accesses=per_layer * trace.num_layers,
        num_hits=sum(hits),
        num_evictions=sum(residency.num_evictions for residency in set(residencies)),
        hit_rate_per_layer=tuple(num / per_layer for num in hits),
    )


def replay_report(
    trace: Trace, policies: Sequence[str], slots: Sequence[str | int], pools: Sequence[Pool]
) -> dict[str, Any]:
    """Replay every policy at every size and pool; the result is ready for `json.dumps`."""
    results = [
        replay(trace, policy, num_slots=parse_slots(size, trace), pool=pool)
        for size in slots
        for pool in pools
        for policy in policies
    ]
    num_all = trace.keys.total
    return {
        "num_tokens": trace.num_tokens,
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "results": [
            {
                "policy": result.policy,
                "pool": result.pool,
                "num_slots": result.num_slots,
                "share": result.num_slots / num_all,
                "hit_rate": result.hit_rate,
                "num_evictions": result.num_evictions,
                "hit_rate_per_layer": list(result.hit_rate_per_layer),
            }
            for result in results
        ],
    }


def _pools(trace: Trace, policy: str, num_slots: int, pool: Pool) -> list[Residency]:
    """The pool that serves each layer."""
    num_layers = trace.num_layers
    if pool == "global":
        table = SlotTable(trace.keys.total, num_slots)
        return [Residency(table, _make(trace, policy, num_slots, range(num_layers)))] * num_layers
    each, rest = divmod(num_slots, num_layers)
    if not each:
        raise ConfigError(
            f"{num_slots} slots cannot serve {num_layers} layers apart. Use a global pool, or more slots."
        )
    sizes = [each + (layer < rest) for layer in range(num_layers)]
    return [
        Residency(SlotTable(trace.keys.total, size), _make(trace, policy, size, range(layer, layer + 1)))
        for layer, size in enumerate(sizes)
    ]


def _make(trace: Trace, policy: str, num_slots: int, layers: range) -> Policy:
    if policy == Belady.name:
        return Belady(trace.experts[:, layers.start : layers.stop], num_experts=trace.num_experts)
    return make_policy(policy, trace.keys, num_slots=num_slots, layers=layers)


def acquire(residency: Residency, keys: Sequence[int]) -> int:
    """Lease resident experts, load the others, release all; in waves if there are too few slots. Returns the hits."""
    held = []
    misses = []
    for key in keys:
        slot = residency.find(key)
        if slot is None:
            misses.append(key)
        else:
            residency.lease(slot)
            held.append(slot)
    num_hits = len(held)
    while misses:
        loading = _load(residency, misses)
        misses = misses[len(loading) :]
        held += loading
        for slot in held:
            residency.release(slot)
        held = []
    for slot in held:
        residency.release(slot)
    return num_hits


def _load(residency: Residency, keys: Sequence[int]) -> list[int]:
    """Load as many of the keys as there are available slots; returns their slots, leased."""
    loading = []
    for key in keys:
        slot = residency.admit(key)
        if slot is None:
            break
        residency.lease(slot)
        loading.append(slot)
    for slot in loading:
        residency.loaded(slot)
    return loading
