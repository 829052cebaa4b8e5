"""Routing traces through passes of several rows: four unrelated conversations at once, and guessed tokens. Simulated.

    python benchmarks/replay_rows.py TRACE.npz ... [--resident 0.25] [--tokens 2000] [--expert-bytes N --dense-bytes N]

Experts come from a trace, and are found by the runtime's own residency and policy, which have seen the trace once
before; only time is calculated: a pass reads its dense weights and each distinct expert of its rows once from memory,
and each that is missing from the disk before, at the given rates. The governors are those of the runtime, and see
nothing but the time of each pass.

conversations  the sequences of the trace, four at once, in passes of as many rows as the governor chooses;
               `four_replayed_ratio`: tokens per second over first come, first served
guesses        one sequence after the other with so many rows per pass, of which a draw makes one guess in five wrong
               (its experts are those of a token elsewhere in the trace): `always` computes every guess, `governed` as
               many as the governor chooses. Over plain decoding; `replay_auto_worst_ratio` is the least of `governed`

Both with every expert in memory and with a share of them (`--resident`). The last line of stdout is one JSON document.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import finish, spread
from speculation import ACCEPTANCE, speculator_of

from offload_moe.native.slot_table import SlotTable
from offload_moe.profile.replay import acquire
from offload_moe.profile.trace import Trace, load_trace
from offload_moe.residency.policy import DEFAULT_POLICY, make_policy
from offload_moe.residency.residency import Residency
from offload_moe.speculate.guess import Guess
from offload_moe.speculate.row_governor import RowGovernor
from offload_moe.speculate.speculator import PassCost

CONVERSATIONS = 4
RIGHT, WRONG = 0, 1


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes and bytes per second."""

    expert: int
    dense: int
    memory: float
    disk: float

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        size = "of one expert (gpt-oss-20b in 4 bits)"
        parser.add_argument("--expert-bytes", dest="expert", metavar="BYTES", type=int, default=13_200_000, help=size)
        parser.add_argument(
            "--dense-bytes", dest="dense", metavar="BYTES", type=int, default=650_000_000, help="that every pass reads"
        )
        parser.add_argument("--memory", type=float, default=40e9, help="bytes per second")
        parser.add_argument("--disk", type=float, default=1e9, help="bytes per second")

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Costs":
        return cls(options.expert, options.dense, options.memory, options.disk)

    def seconds(self, num_distinct: int, num_misses: int) -> float:
        return (self.dense + num_distinct * self.expert) / self.memory + num_misses * self.expert / self.disk


class Machine:
    """Passes of rows through the experts of a trace, in as many slots as a share of them."""

    def __init__(self, trace: Trace, share: float, costs: Costs) -> None:
        num_slots = max(trace.num_layers * trace.top_k, int(share * trace.keys.total))
        policy = make_policy(DEFAULT_POLICY, trace.keys, num_slots=num_slots, layers=range(trace.num_layers))
        self._residency = Residency(SlotTable(trace.keys.total, num_slots), policy)
        first_keys = np.array([[trace.keys.first(layer)] for layer in range(trace.num_layers)])
        self._keys, self._costs, self.elapsed_s = trace.experts + first_keys, costs, 0.0
        self.num_tokens = 0
        for token in range(trace.num_tokens):
            self.compute([token])
        self.elapsed_s = 0.0

    def compute(self, tokens: Sequence[int]) -> PassCost:
        """One pass of rows, which route as these tokens of the trace do."""
        num_distinct = num_misses = 0
        for layer, rows in enumerate(self._keys[tokens].swapaxes(0, 1)):
            keys = list(dict.fromkeys(rows.flatten().tolist()))
            self._residency.policy.access(layer, keys, None)
            num_distinct += len(keys)
            num_misses += len(keys) - acquire(self._residency, keys)
        seconds = self._costs.seconds(num_distinct, num_misses)
        self.elapsed_s += seconds
        return PassCost(len(tokens), seconds, num_misses)

    @property
    def rate(self) -> float:
        return self.num_tokens / self.elapsed_s


def sequences_of(trace: Trace) -> list[list[int]]:
    """The tokens of each, by their number in the trace."""
    ends = np.cumsum(trace.sequence_lengths).tolist()
    return [list(range(begin, end)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def one_after_another(machine: Machine, sequences: Sequence[Sequence[int]]) -> float:
    for token in (token for sequence in sequences for token in sequence):
        machine.compute([token])
        machine.num_tokens += 1
    return machine.rate


def together(machine: Machine, sequences: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Tokens per second, and rows per pass. A sequence that ends makes room for the next."""
    governor, waiting, num_passes = RowGovernor(), [[*each][::-1] for each in sequences][::-1], 0
    running: list[list[int]] = []
    while running or waiting:
        while waiting and len(running) < (CONVERSATIONS if governor.pays else 1):
            running.append(waiting.pop())
        rows = running[: governor.choose(len(running))]
        cost = machine.compute([sequence.pop() for sequence in rows])
        governor.note(cost.num_rows, cost.seconds, cost.num_misses)
        machine.num_tokens += len(rows)
        num_passes += 1
        if governor.pays:  # else the first one goes on
            running = running[len(rows) :] + rows
        running = [sequence for sequence in running if sequence]
    return machine.rate, machine.num_tokens / num_passes


class Scripted:
    """Guesses of which so many are right. The token behind a right one is RIGHT."""

    certainties = (0.5,)
    is_free = True

    def __init__(self, most: int) -> None:
        self._most, self._random = most, random.Random(0)

    def begin(self, ids: Sequence[int]) -> None:
        pass

    def take(self, token: int) -> None:
        pass

    def guess(self, most: int) -> Guess:
        drawn = [self._random.random() < ACCEPTANCE for _ in range(min(most, self._most))]
        return Guess(tuple(RIGHT if is_right else WRONG for is_right in drawn))


def guessed(machine: Machine, sequences: Sequence[Sequence[int]], num_rows: int, *, is_governed: bool) -> float:
    elsewhere, everything = random.Random(0), [token for sequence in sequences for token in sequence]
    speculator = speculator_of(Scripted(num_rows - 1), is_governed=is_governed)
    for sequence in sequences:
        speculator.begin([])
        at = 0
        while at < len(sequence):
            guesses = speculator.guess(len(sequence) - at - 1)
            num_right = next((count for count, each in enumerate(guesses) if each != RIGHT), len(guesses))
            wrong = [elsewhere.choice(everything) for _ in range(len(guesses) - num_right)]
            cost = machine.compute([*sequence[at : at + 1 + num_right], *wrong])
            if guesses:
                speculator.note_pass(cost, len(guesses), num_right)
            else:
                speculator.note_plain(cost)
            for _ in range(1 + num_right):
                speculator.take(RIGHT)
            at += 1 + num_right
        machine.num_tokens += len(sequence)
    return machine.rate


def replayed(trace: Trace, costs: Costs, share: float, rows: Sequence[int]) -> dict[str, Any]:
    sequences = sequences_of(trace)
    plain = one_after_another(Machine(trace, share, costs), sequences)
    shared, rows_per_pass = together(Machine(trace, share, costs), sequences)
    guesses = {
        str(count): {
            name: guessed(Machine(trace, share, costs), sequences, count, is_governed=is_governed) / plain
            for name, is_governed in (("always", False), ("governed", True))
        }
        for count in rows
    }
    return {
        "plain_tokens_per_s": plain,
        "conversations": shared / plain,
        "rows_per_pass": rows_per_pass,
        "guesses": guesses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--tokens", type=int, default=2000, help="of each trace, at most")
    parser.add_argument("--resident", type=float, default=0.25, help="share of the experts in memory")
    parser.add_argument("--rows", type=int, nargs="*", default=list(range(2, 9)))
    Costs.add_options(parser)
    options = parser.parse_args()
    costs = Costs.of(options)
    found: dict[str, Any] = {}
    for path in options.traces:
        trace = load_trace(path).head(options.tokens)
        found[path.stem] = {}
        for name, share in (("resident", 1.0), ("disk", options.resident)):
            found[path.stem][name] = each = replayed(trace, costs, share, options.rows)
            gains = ", ".join(f"{count}: {gain['governed']:.2f}" for count, gain in each["guesses"].items())
            print(
                f"{path.stem}, {name}: four conversations {each['conversations']:.2f} times, "
                f"{each['rows_per_pass']:.2f} rows a pass; guesses by rows, governed: {gains}"
            )
    cells = [each for of_trace in found.values() for each in of_trace.values()]
    finish(
        {
            "benchmark": "replay_rows",
            "label": "simulated",
            "inputs": {**asdict(costs), "acceptance": ACCEPTANCE, "tokens": options.tokens, "share": options.resident},
            "four_replayed_ratio": spread([each["disk"]["conversations"] for each in found.values()]),
            "replay_auto_worst_ratio": min(gain["governed"] for each in cells for gain in each["guesses"].values()),
            "traces": found,
        }
    )


if __name__ == "__main__":
    main()
