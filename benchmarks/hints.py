"""Experts of guessed tokens as hints for reads from disk: what they could give. Simulated, on routing traces.

    python benchmarks/hints.py TRACE.npz ... [--resident 0.25] [--tokens 4000] [--expert-bytes N --dense-bytes N]

Before the pass of each generated token, the experts are read that it is expected to choose in all layers, where they
are missing; then the pass reads the others. Experts are found by the runtime's residency and policy, which have seen
the trace once before. Expected are those of

same token  the last token before that is the same
same text   the token at the end of the longest earlier text that is the same, as prompt lookup finds it
draft       the token itself, but in one of five of a token elsewhere: as if a draft routed as the model does, and were
            right as often (`--acceptance`). No draft does better

recall, precision  of the missing experts, those that were expected, and of the expected ones, those that were chosen
misses, reads      of a token: in its pass, and in all, expected ones included
alone              tokens per second over those without hints, where nothing else reads ahead: reads for hints take
                   place while the pass before computes, all others while nothing does
beside_lookahead   the same where all reads of a pass take place while it computes, as with a lookahead that is never
                   wrong: only more bytes can then change the time

Traces without token ids have `draft` alone. The last line of stdout is one JSON document.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import finish
from replay_rows import Costs, Machine, sequences_of
from speculation import ACCEPTANCE

from offload_moe.profile.replay import acquire
from offload_moe.profile.trace import Trace, load_trace
from offload_moe.speculate.places import Places

Hint = dict[int, int]  # of a token of the trace, the one whose experts are expected


@dataclass(slots=True)
class Counts:
    """Experts, of all passes with hints or without."""

    num_tokens: int = 0
    num_missing: int = 0  # before the hint was read
    num_read_ahead: int = 0
    num_useful: int = 0
    num_misses: int = 0


class Pool(Machine):
    """Whose experts can also be read ahead."""

    def missing(self, token: int) -> list[list[int]]:
        """Of each layer, the experts of a token that are not there."""
        return [[key for key in keys if self._residency.find(key) is None] for keys in self._keys[token].tolist()]

    def read(self, missing: Sequence[Sequence[int]]) -> None:
        for keys in missing:
            acquire(self._residency, keys)


def same_token(ids: Sequence[int]) -> Hint:
    last, found = dict[int, int](), Hint()
    for at, token in enumerate(ids):
        if token in last:
            found[at] = last[token]
        last[token] = at
    return found


def same_text(ids: Sequence[int]) -> Hint:
    """Of each token, the earlier place of the same token with the longest run of equal tokens before it, 16 at most."""
    places, read, found = Places(1), list[int](), Hint()
    for at, token in enumerate(ids):
        read.append(token)
        places.add(read)
        lengths = {place - 1: num_alike_before(read, place) for place in places.of_end(read)}
        if lengths:
            found[at] = max(lengths, key=lambda place: (lengths[place], place))
    return found


def num_alike_before(ids: Sequence[int], place: int) -> int:
    """How many tokens before a place are those before the end."""
    most = min(place, 16)
    return next((count for count in range(most) if ids[place - 1 - count] != ids[-1 - count]), most)


def by_ids(trace: Trace, find: Callable[[Sequence[int]], Hint]) -> Hint:
    """Within each sequence."""
    assert trace.token_ids is not None
    found = Hint()
    for sequence in sequences_of(trace):
        hints = find(trace.token_ids[sequence].tolist())
        found |= {sequence[at]: sequence[place] for at, place in hints.items()}
    return found


def by_draft(trace: Trace, acceptance: float) -> Hint:
    draw = random.Random(0)
    numbers = range(trace.num_tokens)
    return {token: token if draw.random() < acceptance else draw.choice(numbers) for token in numbers}


def replayed(trace: Trace, share: float, costs: Costs, hint: Hint) -> Counts:
    pool, counts = Pool(trace, share, costs), Counts()
    for token in range(trace.num_tokens):
        is_prompt = trace.is_prompt is not None and bool(trace.is_prompt[token])
        if is_prompt:
            pool.compute([token])
            continue
        wanted = {key for keys in pool.missing(token) for key in keys}
        expected = pool.missing(hint[token]) if token in hint else []
        pool.read(expected)
        counts.num_tokens += 1
        counts.num_missing += len(wanted)
        counts.num_read_ahead += sum(map(len, expected))
        counts.num_useful += sum(key in wanted for keys in expected for key in keys)
        counts.num_misses += pool.compute([token]).num_misses
    return counts


def times(trace: Trace, counts: Counts, costs: Costs) -> tuple[float, float]:
    """Seconds of a token: where nothing else reads ahead, and beside a lookahead that is never wrong."""
    compute_s = costs.seconds(trace.num_layers * trace.top_k, 0)
    ahead_s = counts.num_read_ahead / counts.num_tokens * costs.expert / costs.disk
    rest_s = counts.num_misses / counts.num_tokens * costs.expert / costs.disk
    return max(compute_s, ahead_s) + rest_s, max(compute_s, ahead_s + rest_s)


def compared(trace: Trace, share: float, costs: Costs, acceptance: float) -> dict[str, Any]:
    hints = {"draft": by_draft(trace, acceptance)}
    if trace.token_ids is not None:
        hints |= {"same token": by_ids(trace, same_token), "same text": by_ids(trace, same_text)}
    plain = replayed(trace, share, costs, {})
    plain_times = times(trace, plain, costs)
    found: dict[str, Any] = {"none": {"misses": plain.num_misses / plain.num_tokens}}
    for name, hint in hints.items():
        counts = replayed(trace, share, costs, hint)
        alone, beside = (before / after for before, after in zip(plain_times, times(trace, counts, costs), strict=True))
        found[name] = {
            "recall": counts.num_useful / max(counts.num_missing, 1),
            "precision": counts.num_useful / max(counts.num_read_ahead, 1),
            "misses": counts.num_misses / counts.num_tokens,
            "reads": (counts.num_misses + counts.num_read_ahead) / counts.num_tokens,
            "alone": alone,
            "beside_lookahead": beside,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--tokens", type=int, default=4000, help="of each trace, at most")
    parser.add_argument(
        "--resident", type=float, nargs="*", default=[0.25, 0.5], help="shares of the experts in memory"
    )
    parser.add_argument("--acceptance", type=float, default=ACCEPTANCE, help="of a draft")
    Costs.add_options(parser)
    options = parser.parse_args()
    costs = Costs.of(options)
    document: dict[str, Any] = {}
    for path in options.traces:
        trace = load_trace(path).head(options.tokens)
        document[path.stem] = {}
        for share in options.resident:
            document[path.stem][str(share)] = found = compared(trace, share, costs, options.acceptance)
            print(f"{path.stem}, {share:.0%} of the experts: {found['none']['misses']:.2f} misses a token")
            for name, each in found.items():
                if name != "none":
                    print(
                        f"  {name:<12} recall {each['recall']:.2f}, precision {each['precision']:.2f}, "
                        f"{each['misses']:.2f} misses and {each['reads']:.2f} reads a token, "
                        f"alone {each['alone']:.2f} times, beside lookahead {each['beside_lookahead']:.2f}"
                    )
    finish(
        {
            "benchmark": "hints",
            "label": "simulated",
            "inputs": {**asdict(costs), "acceptance": options.acceptance, "tokens": options.tokens},
            "traces": document,
        }
    )


if __name__ == "__main__":
    main()
