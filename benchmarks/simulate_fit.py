"""Constants of this machine for the simulation, from measurements at some budgets. See simulate_validation.py."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload_moe.profile.trace import Trace
from offload_moe.residency.keys import ExpertKeys
from offload_moe.simulate import DiskModel, RunCosts, Simulation, VirtualPools, answers_of, simulate

STEPS, NEAR = 4, 0.02  # of a search along secants, and the relative error that ends it
PROBE_S = 1e-3
HOST_COSTS = ("partial_host_s", "late_host_s")
BYTE_S = (0.05e-9, 1e-9, 50e-9)  # least, expected and most seconds per byte of a disk
STREAMS = (1.0, 1.4, 2.0)  # that it takes to reach the rate of a disk


class Fitter:
    def __init__(self, measured: dict[str, Any], trace: Trace, *, num_warm_up: int) -> None:
        self._measured = measured
        self._trace = trace
        self._answers = answers_of(trace)
        self._num_warm_up = num_warm_up
        # a record is read by one reader
        self._disk = DiskModel(bytes_per_s=1e9, part_bytes=1 << 40, num_readers=measured["num_readers"])
        self._busy_s: dict[float, float] = {}  # of a token, beside stalls
        self._costs = RunCosts()

    def fit(self, shares: Sequence[float]) -> None:
        """What Python takes to help a run, as watched; partial layers and late experts, from the time beside stalls;
        the disk, from stalls.
        """
        partial = [share for share in shares if share < 1]
        descending = sorted(shares, reverse=True)
        busy_s = [self._token_s(share) - self._median(share, "stall_s") for share in descending]
        self._busy_s = dict(zip(descending, _ascending(busy_s), strict=True))
        self._costs = self._resident_costs()
        passes = any(trial["num_passes"] for share in partial for trial in self._trials(share))
        ask_host_s, account_host_s = self._asking(partial)
        self._costs = replace(
            self._costs, has_token_passes=passes, ask_host_s=ask_host_s, account_host_s=account_host_s
        )
        busy = [self._busy_s[share] for share in partial]
        self._costs = replace(self._costs, **self._host_costs(partial, busy))
        self._fit_disk(partial)

    def _asking(self, shares: Sequence[float]) -> list[float]:
        """Seconds that a request takes, and more for each layer before it. The median of the trials."""
        trials = zip(*(self._trials(share) for share in shares), strict=True)
        found = [_line([delay for trial in same for delay in trial["ask_delays"]]) for same in trials]
        return [statistics.median(values) for values in zip(*found, strict=True)]

    def _fit_disk(self, shares: Sequence[float]) -> None:
        """Where little is missing, a read is alone and takes a stream's time; where much is, reads share the disk."""
        stalled = np.array([self._median(share, "stall_s") for share in shares])
        found: list[tuple[float, DiskModel]] = []

        def error(byte_s: float) -> float:
            self._disk = replace(self._disk, bytes_per_s=1 / byte_s, stream_bytes_per_s=1 / byte_s / num_streams)
            stalls = self._stalls(shares)
            found.append((float(np.square(stalls / stalled - 1).sum()), self._disk))
            return float(stalls.mean() / stalled.mean() - 1)

        for num_streams in STREAMS:
            if num_streams <= self._disk.num_readers:
                _search(error, *BYTE_S)
        _, self._disk = min(found, key=lambda pair: pair[0])

    def _stalls(self, shares: Sequence[float]) -> NDArray[np.float64]:
        """Simulated, of a token."""
        return np.array([simulation.stall_s for simulation in self._simulations(shares)])

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
            keys=ExpertKeys([measured["num_experts"]] * measured["num_layers"]),
            slot_bytes=measured["slot_bytes"],
            num_ram_slots=self._trials(share)[0]["num_slots"],
        )
        return simulate(self._answers, pools, self._costs, self._disk, num_warm_up=self._num_warm_up)

    def constants(self) -> dict[str, Any]:
        return {"costs": asdict(self._costs), "disk": asdict(self._disk)}

    def _resident_costs(self) -> RunCosts:
        """Parts as recorded with everything resident, all of them scaled to what a token took without recording: the
        machine was slower or quicker then, not its work between layers.
        """
        trace = self._trace
        assert trace.forwards is not None
        assert trace.is_prompt is not None
        assert trace.forward_s is not None
        assert trace.compute_s is not None
        forwards = trace.forwards[~trace.is_prompt]
        experts_s = float(np.median(trace.compute_s[forwards].sum(axis=1)))
        forward_s = float(np.median(trace.forward_s[forwards]))
        outside_s = max(0.0, self._measured["recorded"]["median_token_s"] - forward_s)
        scale = self._busy_s[1.0] / (forward_s + outside_s)
        num_layers = trace.num_layers
        return RunCosts(
            token_host_s=scale * outside_s,
            layer_host_s=scale * (forward_s - experts_s) / num_layers,
            expert_s=scale * experts_s / num_layers / trace.top_k,
        )

    def _token_s(self, share: float) -> float:
        return 1 / self._median(share, "decode_tokens_per_s")

    def _median(self, share: float, name: str) -> float:
        return statistics.median(trial[name] for trial in self._trials(share))

    def _trials(self, share: float) -> list[dict[str, Any]]:
        trials: list[dict[str, Any]] = self._measured["budgets"][str(share)]
        return trials


def _line(delays: Sequence[Sequence[float]]) -> list[float]:
    """What `AskWatch.delays` grows by: at all, and per layer."""
    if not delays:
        return [0.0, 0.0]
    num_layers, counts, seconds = np.array(delays).T
    columns, weights = np.stack([np.ones_like(counts), num_layers], axis=1), np.sqrt(counts)
    found = np.linalg.lstsq(columns * weights[:, None], seconds * weights, rcond=None)[0]
    return [max(0.0, value) for value in found.tolist()]


def _ascending(values: Sequence[float]) -> list[float]:
    """The nearest that ascend: what is missing makes no token quicker, so where it seems to, both are the mean."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and statistics.mean(groups[-2]) > statistics.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [statistics.mean(group) for group in groups for _ in group]


def _search(error: Callable[[float], float], least: float, guess: float, most: float) -> None:
    """Close in on where an ascending, nearly straight error changes sign."""
    last, value = guess, 1.5 * guess
    last_error = error(last)
    for _ in range(STEPS):
        value_error = error(value)
        if abs(value_error) < NEAR or value_error == last_error:
            return
        following = value - value_error * (value - last) / (value_error - last_error)
        last, last_error, value = value, value_error, min(most, max(least, following))
