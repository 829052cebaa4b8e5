"""Prefetch: demand first, nothing needed is evicted, and it turns itself off while it does not pay."""

import subprocess
import sys
import threading
import time

import pytest

from offload_moe.memory.workers import TransferWorkers
from offload_moe.native.kernels import SlotTable
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import make_policy
from offload_moe.residency.prefetch import BLOCK_TOKENS, NUM_BLOCKS, SETTLED_TOKENS, PrefetchGovernor
from offload_moe.residency.residency import Residency


class Clock:
    """Tokens take as long as the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_tokens(governor: PrefetchGovernor, clock: Clock, num_tokens: int, on_s: float, off_s: float) -> list[bool]:
    states = []
    for _ in range(num_tokens):
        states.append(governor.begin_token())
        clock.now += on_s if states[-1] else off_s
    return states


@pytest.mark.parametrize(("on_s", "off_s", "ends_on"), [(0.5, 1.0, True), (1.0, 1.0, True), (1.3, 1.0, False)])
def test_the_quicker_way_is_kept(on_s: float, off_s: float, ends_on: bool) -> None:
    clock = Clock()
    governor = PrefetchGovernor(clock)
    states = run_tokens(governor, clock, BLOCK_TOKENS * NUM_BLOCKS + 1, on_s, off_s)
    assert sum(states[:-1]) == BLOCK_TOKENS * NUM_BLOCKS // 2
    assert set(run_tokens(governor, clock, SETTLED_TOKENS - 2, on_s, off_s)) == {ends_on}


def test_a_predictor_that_is_always_wrong_costs_little() -> None:
    clock = Clock()
    run_tokens(PrefetchGovernor(clock), clock, 5000, on_s=1.5, off_s=1.0)
    assert clock.now < 5000 * 1.05


def test_it_is_tried_again_when_circumstances_change() -> None:
    clock = Clock()
    governor = PrefetchGovernor(clock)
    run_tokens(governor, clock, 200, on_s=1.5, off_s=1.0)
    states = run_tokens(governor, clock, 2 * SETTLED_TOKENS, on_s=0.5, off_s=1.0)
    assert states[-1]


def test_a_pause_between_tokens_is_no_measurement() -> None:
    clock = Clock()
    governor = PrefetchGovernor(clock)
    for token in range(BLOCK_TOKENS * NUM_BLOCKS + 10):
        is_on = governor.begin_token()
        clock.now += 0.5 if is_on else 1.0
        if token % 5 == 0:
            governor.pause()
            clock.now += 1000.0 if is_on else 0.0
    assert run_tokens(governor, clock, 3, 0.5, 1.0)[-1]


def test_demands_overtake_prefetches_and_a_hurried_prefetch_is_a_demand() -> None:
    order: list[str] = []
    gate = threading.Event()
    workers = TransferWorkers(1, "test")
    workers.submit(0, gate.wait, is_prefetch=False)
    for slot, name in ((1, "first"), (2, "second"), (3, "third")):
        workers.submit(slot, lambda name=name: order.append(name), is_prefetch=True)
    workers.submit(4, lambda: order.append("demand"), is_prefetch=False)
    workers.promote(3)
    gate.set()
    deadline = time.monotonic() + 10
    while len(order) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    workers.close()
    assert order == ["demand", "third", "first", "second"]


def test_a_prefetch_can_be_cancelled_until_it_runs() -> None:
    gate, begun = threading.Event(), threading.Event()
    workers = TransferWorkers(1, "test")
    workers.submit(0, lambda: (begun.set(), gate.wait())[0], is_prefetch=True)
    workers.submit(1, gate.wait, is_prefetch=True)
    assert begun.wait(10)
    assert not workers.cancel(0)
    assert workers.cancel(1)
    assert not workers.cancel(1)
    gate.set()
    workers.close()


def test_prefetches_leave_a_thread_to_demands() -> None:
    gate, demanded = threading.Event(), threading.Event()
    workers = TransferWorkers(2, "test")
    for slot in range(5):
        workers.submit(slot, gate.wait, is_prefetch=True)
    workers.submit(9, demanded.set, is_prefetch=False)
    assert demanded.wait(10)
    gate.set()
    workers.close()


def test_threads_end_before_the_interpreter_does() -> None:
    """A daemon thread that is stopped inside torch's own code aborts the process."""
    code = """
import atexit, threading, time
atexit.register(lambda: print([t.name for t in threading.enumerate() if t.name.startswith("reader")]))
from offload_moe.memory.workers import TransferWorkers
from offload_moe.residency.keys import ExpertKeys
TransferWorkers(2, "reader").submit(0, lambda: time.sleep(0.2), is_prefetch=False)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.strip()) == (0, "[]")


def test_what_is_kept_is_not_evicted() -> None:
    residency = Residency(SlotTable(9, 2), make_policy("lru", ExpertKeys([9]), num_slots=2))
    for key in (0, 1):
        slot = residency.admit(key)
        assert slot is not None
        residency.loaded(slot)
    assert residency.admit(2, keep={0, 1}) is None
    assert residency.admit(2, keep={0}) is not None
    assert residency.find(0) is not None
    assert residency.find(1) is None
