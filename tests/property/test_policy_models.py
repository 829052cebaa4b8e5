"""Policies against slow models that follow the definition, and Belady against exhaustive search."""

from collections.abc import Callable
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_moe.profile.replay import replay
from offload_moe.profile.trace import Trace
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import POLICY_NAMES, make_policy
from offload_moe.residency.policy.frequency import HALF_LIFE

NUM_KEYS = 6

Uses = list[int]  # the times of all uses of a key, oldest first

MODELS: dict[str, Callable[[Uses, int], tuple[float, ...]]] = {
    "lru": lambda uses, now: (uses[-1],),
    "lfu": lambda uses, now: (len(uses), uses[-1]),
    "decayed": lambda uses, now: (round(sum(2.0 ** ((use - now) / HALF_LIFE) for use in uses), 9), uses[-1]),
    "lru-2": lambda uses, now: (uses[-2] if len(uses) > 1 else 0, uses[-1]),
}


@pytest.mark.parametrize("name", sorted(MODELS))
@given(accesses=st.lists(st.integers(0, NUM_KEYS - 1), max_size=60), leased=st.sets(st.integers(0, NUM_KEYS - 1)))
@settings(max_examples=60, deadline=None)
def test_victims_are_the_definitions(name: str, accesses: list[int], leased: set[int]) -> None:
    """One expert per token through three slots; every victim is the minimum of the definition."""
    policy = make_policy(name, ExpertKeys([NUM_KEYS]), num_slots=3)
    uses: dict[int, Uses] = {}
    resident: set[int] = set()
    for now, key in enumerate(accesses, start=1):
        policy.access(0, [key])
        uses.setdefault(key, []).append(now)
        if key in resident:
            continue
        if len(resident) == 3:
            victim = policy.victim(leased.__contains__)
            movable = resident - leased
            assert (victim is None) == (not movable)
            if victim is None:
                continue
            worth = {k: MODELS[name](uses[k], now) for k in movable}
            assert worth[victim] == min(worth.values())
            policy.remove(victim)
            resident.remove(victim)
        policy.insert(key)
        resident.add(key)


@st.composite
def small_traces(draw: st.DrawFn) -> Trace:
    num_layers, num_experts, top_k = draw(st.integers(1, 2)), draw(st.integers(3, 4)), draw(st.integers(1, 2))
    row = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    tokens = draw(st.lists(st.lists(row, min_size=num_layers, max_size=num_layers), min_size=1, max_size=6))
    return Trace(experts=np.array(tokens), num_experts=num_experts, sequence_lengths=np.array([len(tokens)]))


@given(trace=small_traces(), num_slots=st.integers(2, 5))
@settings(max_examples=80, deadline=None)
def test_belady_is_the_optimum(trace: Trace, num_slots: int) -> None:
    steps = [
        frozenset(int(e) + layer * trace.num_experts for e in trace.experts[token, layer])
        for token in range(trace.num_tokens)
        for layer in range(trace.num_layers)
    ]
    found = replay(trace, "belady", num_slots=num_slots).num_hits
    assert found == most_hits(steps, num_slots)
    for name in POLICY_NAMES:
        assert replay(trace, name, num_slots=num_slots).num_hits <= found


def most_hits(steps: list[frozenset[int]], num_slots: int) -> int:
    """By trying every set of survivors at every step."""

    @cache
    def best(step: int, resident: frozenset[int]) -> int:
        if step == len(steps):
            return 0
        needed = steps[step]
        others = sorted(resident - needed)
        room = max(0, num_slots - len(needed))
        options = {frozenset(others)} if len(others) <= room else subsets(others, room)
        return len(needed & resident) + max(best(step + 1, needed | kept) for kept in options)

    return best(0, frozenset())


def subsets(keys: list[int], size: int) -> set[frozenset[int]]:

    return {frozenset(chosen) for chosen in combinations(keys, size)}
