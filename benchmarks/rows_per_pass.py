"""What 1, 2, 4 or 8 rows cost in one pass of the decoder: of one sequence, and of several with caches of their own.

    python benchmarks/rows_per_pass.py [STORE] [--threads 2] [--rows 1,2,4,8] [--tokens 64] [--trials 5] [--ram 2.4GiB]

Every slot is filled first. A run computes `--tokens` tokens behind `--prompt-tokens` cached ones, so many rows at a
time, with the head: random tokens, which choose other experts each. Runs of all kinds alternate. A row is a token;
CPU time is that of all threads. `experts_per_layer`: how many distinct ones a pass used. The last line of stdout is
one JSON document.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from harness import bind_to_cores, finish, paired_ratio, prompt_ids, spread
from run_store import fill

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

KINDS = ("one_sequence", "several_sequences")


class Rows:
    """Passes over one model, behind a prompt that was computed once."""

    def __init__(self, model: Any, num_prompt_tokens: int) -> None:
        import torch
        from transformers import DynamicCache

        from offload_moe.families.cache_name import with_cache

        self._model, self._seeds = model, itertools.count(1)
        self._prompt = DynamicCache(config=model.hf.config)
        with torch.inference_mode():
            model.hf(torch.tensor([prompt_ids(0, num_prompt_tokens)]), **with_cache(self._prompt))

    def run(self, kind: str, num_rows: int, num_tokens: int) -> dict[str, float]:
        """Compute so many tokens, `num_rows` of them at a time."""
        import torch

        from offload_moe.decode import pass_rows

        hf, before = self._model.hf, self._model.stats.copy()
        head = hf.get_output_embeddings()
        passes = list(self._passes(kind, num_rows, num_tokens // num_rows))
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for sequences in passes:
                hidden = pass_rows(hf, sequences)
                assert hidden is not None, "this model takes no rows in one pass"
                head(hidden)
        wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        seen = self._model.stats.since(before)
        return {
            "tokens_per_s": num_tokens / wall_s,
            "cpu_ms_per_row": 1e3 * cpu_s / num_tokens,
            "experts_per_layer": seen.num_accesses / seen.num_acquires,
            "hit_rate": seen.hit_rate,
        }

    def _passes(self, kind: str, num_rows: int, num_passes: int) -> Iterator[list[tuple[Any, Any]]]:
        import torch

        caches = [copy.deepcopy(self._prompt) for _ in range(1 if kind == "one_sequence" else num_rows)]
        for _ in range(num_passes):
            ids = torch.tensor(prompt_ids(next(self._seeds), num_rows))
            yield list(zip(ids.chunk(len(caches)), caches, strict=True))


def alternated(runs: dict[str, Callable[[], dict[str, float]]], num_trials: int) -> dict[str, dict[str, list[float]]]:
    """Figures by their names and those of the runs; the first trial is a warm-up."""
    figures: dict[str, dict[str, list[float]]] = {}
    for trial in range(num_trials + 1):
        for name, run in runs.items():
            for figure, value in run().items():
                if trial:
                    figures.setdefault(figure, {}).setdefault(name, []).append(value)
    return figures


def compared(figures: dict[str, dict[str, list[float]]], kind: str, rows: list[int]) -> dict[str, Any]:
    """Of one kind, by the number of rows: the figures, and tokens per second over those of the fewest rows."""
    rates = figures["tokens_per_s"]
    return {
        str(count): {
            **{figure: spread(values[f"{kind} {count}"]) for figure, values in figures.items()},
            "times_the_fewest": paired_ratio(rates, f"{kind} {count}", f"{kind} {rows[0]}"),
        }
        for count in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", default="demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,2,4,8", help="numbers of rows, the fewest first")
    parser.add_argument("--tokens", type=int, default=64, help="of each run; a multiple of all numbers of rows")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--ram", default=None)
    options = parser.parse_args()
    rows = [int(count) for count in options.rows.split(",")]
    bind_to_cores(options.threads)
    import torch

    from offload_moe import load
    from offload_moe.native import kernels

    torch.set_num_threads(options.threads)
    kernels.set_threads(options.threads)
    with load(options.store, ram=options.ram, context=options.prompt_tokens + options.tokens + 32) as model:
        fill(model)
        passes = Rows(model, options.prompt_tokens)
        runs = {f"{kind} {count}": partial(passes.run, kind, count, options.tokens) for kind in KINDS for count in rows}
        figures = alternated(runs, options.trials)
    found = {kind: compared(figures, kind, rows) for kind in KINDS}
    for kind, results in found.items():
        print(kind, {count: round(each["tokens_per_s"]["median"], 1) for count, each in results.items()})
    finish(
        {
            "benchmark": "rows_per_pass",
            "label": "measured",
            "store": options.store,
            "threads": options.threads,
            "num_tokens": options.tokens,
            "num_prompt_tokens": options.prompt_tokens,
            **found,
        }
    )


if __name__ == "__main__":
    main()
