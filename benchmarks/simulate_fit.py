"""Constants of this machine for the simulation, from measurements at some budgets. See simulate_validation.py."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from offload_moe.simulate import DiskModel, RunCosts, Simulation, VirtualPools, answers_of, simulate
from offload_moe.trace import Trace

STEPS = 10  # of a search by halves


class Fitter:
    def __init__(self, measured: dict[str, Any], trace: Trace, *, num_warm_up: int) -> None:
        self._measured = measured
        self._trace = trace
        self._answers = answers_of(trace)
        self._num_warm_up = num_warm_up
        self._disk = DiskModel(bytes_per_s=1e9, part_bytes=1 << 40)  # a record is read by one reader
        self._costs = self._resident_costs()

    def fit(self, shares: Sequence[float]) -> None:
        """What incomplete waves cost the host, from the time beside stalls; the disk's rate, from the stalls."""
        partial = [share for share in shares if share < 1]
        whole_s = self._token_s(1.0)

        def busy_error(seconds: float) -> float:
            self._costs = replace(self._costs, partial_host_s=seconds)
            return self._mean_log(
                partial,
                lambda s: s.token_s - s.stall_s,
                lambda share: max(whole_s, self._token_s(share) - self._median(share, "stall_s")),
            )

        def stall_error(log_seconds_per_byte: float) -> float:
            rate = math.exp(-log_seconds_per_byte)
            self._disk = replace(self._disk, bytes_per_s=rate, stream_bytes_per_s=rate / 2)
            return self._mean_log(partial, lambda s: s.stall_s, lambda share: self._median(share, "stall_s"))

        for _ in range(2):  # what is busy hides reads, and what is read late is no work
            _search(busy_error, 0.0, 10e-3)
            _search(stall_error, -math.log(50e9), -math.log(5e6))

    def simulate(self, share: float) -> Simulation:
        measured = self._measured
        pools = VirtualPools(
            num_layers=measured["num_layers"],
            num_experts=measured["num_experts"],
            slot_bytes=measured["slot_bytes"],
            num_ram_slots=measured["budgets"][str(share)][0]["num_slots"],
        )
        return simulate(self._answers, pools, self._costs, self._disk, num_warm_up=self._num_warm_up)

    def constants(self) -> dict[str, Any]:
        return {"costs": asdict(self._costs), "disk": asdict(self._disk)}

    def _resident_costs(self) -> RunCosts:
        """Parts as recorded with everything resident, scaled to what a token took without recording."""
        trace = self._trace
        assert trace.forwards is not None
        assert trace.is_prompt is not None
        assert trace.forward_s is not None
        assert trace.compute_s is not None
        forwards = trace.forwards[~trace.is_prompt]
        experts_s = float(trace.compute_s[forwards].sum() / len(forwards))
        forward_s = float(trace.forward_s[forwards].sum() / len(forwards))
        whole_s = self._token_s(1.0)
        scale = min(1.0, whole_s / forward_s)
        num_layers = trace.num_layers
        return RunCosts(
            token_host_s=whole_s - scale * forward_s,
            layer_host_s=scale * (forward_s - experts_s) / num_layers,
            expert_s=scale * experts_s / num_layers / trace.top_k,
        )

    def _token_s(self, share: float) -> float:
        return 1 / self._median(share, "decode_tokens_per_s")

    def _median(self, share: float, name: str) -> float:
        return statistics.median(trial[name] for trial in self._measured["budgets"][str(share)])

    def _mean_log(
        self, shares: Sequence[float], simulated: Callable[[Simulation], float], measured: Callable[[float], float]
    ) -> float:
        """Positive where the simulation is too slow."""
        return statistics.mean(
            math.log(max(simulated(self.simulate(s)), 1e-6) / max(measured(s), 1e-6)) for s in shares
        )


def _search(error: Callable[[float], float], low: float, high: float) -> None:
    """The value where an ascending error changes sign; it stays set."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if error(middle) > 0 else (middle, high)
    error((low + high) / 2)
