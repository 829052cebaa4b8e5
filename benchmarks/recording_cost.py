"""What recording a trace costs: CPU time of decoded tokens with and without, alternated.

    python benchmarks/recording_cost.py [MODEL] [--pairs 20] [--tokens 24] [--ram SIZE]

One thread computes, so that the process's CPU time is the time of the token. Of each kind of token the tenth percentile
is compared, which other work on the machine disturbs least; arrays are made of what was put aside every 64 tokens, and
that is timed apart and added. The demo is the worst case: the smallest experts, the same number of calls.
The last line of stdout is one JSON document.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

from harness import finish

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--ram")
    options = parser.parse_args()
    import torch

    from offload_moe import load
    from offload_moe.native import kernels

    torch.set_num_threads(1)
    kernels.set_threads(1)
    with load(options.model, ram=options.ram, prefetch=0) as model:
        model.hf.generation_config.eos_token_id = None
        spent: dict[bool, list[float]] = {False: [], True: []}
        settling: list[float] = []
        for pair in range(-1, options.pairs):
            for is_recorded in (False, True) if pair % 2 else (True, False):
                seconds, settled = token_cpu_s(model, options.tokens, is_recorded)
                if pair >= 0:  # the first pair warms up
                    spent[is_recorded] += seconds
                    settling += settled
    quick = {is_recorded: statistics.quantiles(seconds, n=10)[0] for is_recorded, seconds in spent.items()}
    extra_s = quick[True] - quick[False] + min(settling)
    finish(
        {
            "benchmark": "recording_cost",
            "label": "measured",
            "num_tokens": len(spent[True]),
            "token_cpu_s": {"plain": quick[False], "recorded": quick[True]},
            "median_token_cpu_s": {
                "plain": statistics.median(spent[False]),
                "recorded": statistics.median(spent[True]),
            },
            "settling_cpu_s_per_token": min(settling),
            "extra_s": extra_s,
            "extra": extra_s / quick[False],
        }
    )


def token_cpu_s(model: Any, num_tokens: int, is_recorded: bool) -> tuple[list[float], list[float]]:
    """CPU seconds of every token after the first; if recorded, of making arrays of what was put aside, per token."""
    import torch

    from offload_moe.chat.prompt import stream_tokens

    ids = torch.arange(300, 308)[None]
    seconds = []
    with (
        model.trace() if is_recorded else nullcontext() as recorder,
        stream_tokens(model.hf, None, ids, temperature=0, max_new_tokens=num_tokens) as stream,
    ):
        tokens = iter(stream)
        next(tokens)
        began = time.process_time()
        for _ in tokens:
            seconds.append(time.process_time() - began)
            began = time.process_time()
    if recorder is None:
        return seconds, []
    began = time.process_time()
    recorder.trace()
    return seconds, [(time.process_time() - began) / num_tokens]


if __name__ == "__main__":
    main()
