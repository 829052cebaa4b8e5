"""Answers through the virtual runtime, and their result."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from offload_moe.residency.counters import Counters
from offload_moe.simulate.costs import DiskModel, LinkModel, LookaheadModel, RunCosts
from offload_moe.simulate.result import Simulation
from offload_moe.simulate.runtime import VirtualPools, VirtualRuntime
from offload_moe.simulate.workload import Answer

SlotsFor = Callable[[int, int], int]


class _Totals:
    """Sums over the answers that count."""

    def __init__(self, runtime: VirtualRuntime, slots_for: SlotsFor | None) -> None:
        self._runtime = runtime
        self._slots_for = slots_for
        self.prompt_s: list[float] = []
        self.token_s: list[float] = []
        self.num_prompt_tokens = 0
        self.fast, self.ram = Counters(), Counters()
        self.device_wait_s = 0.0
        self.num_stepwise = 0

    def add(self, answer: Answer, chunk_tokens: int) -> None:
        runtime = self._runtime
        chunks = range(0, len(answer.prompt), chunk_tokens)
        seconds = sum(self._forward(answer.prompt[start : start + chunk_tokens], start) for start in chunks)
        if chunks:
            self.prompt_s.append(seconds)
            self.num_prompt_tokens += len(answer.prompt)
        num_stepwise = runtime.card.num_stepwise if runtime.card is not None else 0
        fast, ram, waited = runtime.scheduler.counters.copy(), runtime.ram.counters.copy(), runtime.processor.waited_s
        for row in range(len(answer.decode)):
            self.token_s.append(self._forward(answer.decode[row : row + 1], len(answer.prompt) + row))
        self.fast = _add(self.fast, runtime.scheduler.counters.since(fast))
        self.ram = _add(self.ram, runtime.ram.counters.since(ram))
        self.device_wait_s += runtime.processor.waited_s - waited
        self.num_stepwise += runtime.card.num_stepwise - num_stepwise if runtime.card is not None else 0

    def _forward(self, experts: NDArray[Any], num_before: int) -> float:
        """experts ``[T, L, K]``, after that many tokens of context. Returns the seconds."""
        if self._slots_for is not None:
            self._runtime.resize(self._slots_for(num_before + len(experts), len(experts)))
        return self._runtime.forward(experts)


def simulate(
    answers: Sequence[Answer],
    pools: VirtualPools,
    costs: RunCosts,
    disk: DiskModel,
    link: LinkModel | None = None,
    lookahead: LookaheadModel | None = None,
    *,
    num_warm_up: int = 0,
    chunk_tokens: int = 1 << 30,
    slots_for: SlotsFor | None = None,
) -> Simulation:
    """Run answers one after another from a cold start. num_warm_up: answers at the beginning that are not counted.

    chunk_tokens: the limit of prompt tokens per forward. slots_for: the number of fast slots during a forward, from the
    context after it and its new tokens; None: always the pools' own number.
    """
    runtime = VirtualRuntime(pools, costs, disk, link, lookahead)
    for answer in answers[:num_warm_up]:
        _Totals(runtime, slots_for).add(answer, chunk_tokens)
    totals = _Totals(runtime, slots_for)
    for answer in answers[num_warm_up:]:
        totals.add(answer, chunk_tokens)
    return _summary(totals, has_device=pools.num_device_slots > 0, has_passes=runtime.card is not None)


def _summary(totals: _Totals, *, has_device: bool, has_passes: bool) -> Simulation:
    fast, ram, num_tokens = totals.fast, totals.ram, len(totals.token_s)
    prompt_s, decode_s = sum(totals.prompt_s), sum(totals.token_s)
    ordered = sorted(totals.token_s)
    return Simulation(
        decode_tokens_per_s=num_tokens / decode_s,
        prompt_tokens_per_s=totals.num_prompt_tokens / prompt_s if prompt_s else 0.0,
        first_token_s=statistics.mean(totals.prompt_s) if totals.prompt_s else 0.0,
        num_decode_tokens=num_tokens,
        num_prompt_tokens=totals.num_prompt_tokens,
        token_s=decode_s / num_tokens,
        slow_token_s=ordered[min(num_tokens - 1, round(0.95 * num_tokens))],
        stall_s=fast.stall_s / num_tokens,
        device_wait_s=totals.device_wait_s / num_tokens,
        hit_rate=fast.hit_rate,
        delayed_hit_rate=fast.num_delayed_hits / max(1, fast.num_accesses),
        ram_hit_rate=ram.hit_rate if has_device and ram.num_accesses else None,
        disk_bytes=ram.disk_bytes / num_tokens,
        h2d_bytes=fast.h2d_bytes / num_tokens,
        num_prefetches=fast.num_prefetches / num_tokens,
        num_useful_prefetches=fast.num_useful_prefetches / num_tokens,
        num_computed_on_cpu=fast.num_computed_on_cpu / num_tokens,
        stepwise_rate=totals.num_stepwise / num_tokens if has_passes else None,
    )


def _add(first: Counters, second: Counters) -> Counters:
    """The sum of both, as a difference of a difference."""
    return first.since(Counters().since(second))
