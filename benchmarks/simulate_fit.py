"""Constants of this machine for the simulation, from measurements at some budgets. See simulate_validation.py."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload_moe.simulate import DiskModel, RunCosts, Simulation, VirtualPools, answers_of, simulate
from offload_moe.trace import Trace

STEPS = 6  # of a search by halves
PROBE_S = 1e-3
HOST_COSTS = ("partial_host_s", "late_host_s")


class Fitter:
    def __init__(self, measured: dict[str, Any], trace: Trace, *, num_warm_up: int) -> None:
        self._measured = measured
        self._trace = trace
        self._answers = answers_of(trace)
        self._num_warm_up = num_warm_up
        self._disk = DiskModel(bytes_per_s=1e9, part_bytes=1 << 40)  # a record is read by one reader
        self._costs = self._resident_costs()

    def fit(self, shares: Sequence[float]) -> None:
        """What partial layers and late experts cost the host, from the time beside stalls; the disk, from stalls."""
        partial = [share for share in shares if share < 1]
        whole_s = self._token_s(1.0)

        def stall_error(log_seconds_per_byte: float) -> float:
            rate = math.exp(-log_seconds_per_byte)
            self._disk = replace(self._disk, bytes_per_s=rate, stream_bytes_per_s=rate / 2)
            return statistics.mean(s.stall_s for s in self._simulations(partial)) - stalled

        busy = [max(whole_s, self._token_s(share) - self._median(share, "stall_s")) for share in partial]
        stalled = statistics.mean(self._median(share, "stall_s") for share in partial)
        self._costs = replace(self._costs, **self._host_costs(partial, busy))
        _search(stall_error, -math.log(20e9), -math.log(20e6))

    def _host_costs(self, shares: Sequence[float], busy: Sequence[float]) -> dict[str, float]:
        """The non-negative pair that comes nearest to the seconds beside stalls, which grow linearly with both."""
        base = self._costs
        without = self._busy(shares)
        columns = []
        for name in HOST_COSTS:
            self._costs = replace(base, **{name: PROBE_S})
            columns.append((self._busy(shares) - without) / PROBE_S)
        self._costs = base
        wanted, slopes = np.array(busy) - without, np.stack(columns, axis=1)
        found = np.linalg.lstsq(slopes, wanted, rcond=None)[0]
        if found.min() < 0:  # one of the two explains it alone
            only = int(found.argmax())
            column = slopes[:, only]
            found = np.zeros(len(HOST_COSTS))
            found[only] = max(0.0, column @ wanted / (column @ column))
        return dict(zip(HOST_COSTS, found.tolist(), strict=True))

    def _busy(self, shares: Sequence[float]) -> NDArray[np.float64]:
        """Simulated seconds of a token beside stalls."""
        return np.array([simulation.token_s - simulation.stall_s for simulation in self._simulations(shares)])

    def _simulations(self, shares: Sequence[float]) -> list[Simulation]:
        return [self.simulate(share) for share in shares]

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


def _search(error: Callable[[float], float], low: float, high: float) -> None:
    """The value where an ascending error changes sign; it stays set."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if error(middle) > 0 else (middle, high)
    error((low + high) / 2)
