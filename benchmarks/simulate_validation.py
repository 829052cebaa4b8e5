"""How well the simulation predicts decode on this machine: constants fitted on some budgets, compared on others.

    python benchmarks/simulate_validation.py --folder SCRATCH [--models demo olmoe] [--config FILE]
           [--trials 3] [--tokens N] [--predict-only]

For each model and each share of its experts that has a slot in RAM, the real runtime answers the same prompts, prefetch
off; the rest comes from disk. Every budget computes the same tokens, so one recorded trace serves all. From the
budgets named in FITTED come all constants: the time of a token with everything resident; what a layer whose experts do
not come all at once costs the host, and each of those that come late, from the time beside stalls; what Python takes to
help a run, as watched while it does; and the rates of the disk and of one of its reads, from the stalls. The budgets in
VALIDATED are only compared. Measurements are kept in SCRATCH; the last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from harness import HERE, finish, make, spread

FITTED = (1.0, 0.3, 0.75)
VALIDATED = (0.2, 0.4, 0.5, 0.9)
NUM_ANSWERS, NUM_WARM_UP = 3, 1
SETTINGS = {"demo": {"tokens": 64, "prompt_tokens": 16}, "olmoe": {"tokens": 24, "prompt_tokens": 16}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--config", type=Path, default=HERE / "configs/OLMoE-1B-7B-0125.json", help="of `olmoe`")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="of an answer, instead of what is usual for the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--predict-only", action="store_true", help="compare with what SCRATCH already holds")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not options.predict_only:
        from simulate_measure import measure

        for name in options.models:
            settings = SETTINGS[name] | ({"tokens": options.tokens} if options.tokens else {})
            measure(
                store_of(name, options.folder, options.config),
                (*FITTED, *VALIDATED),
                options.folder / f"{name}.npz",
                options.folder / f"{name}.json",
                num_trials=options.trials,
                num_answers=NUM_ANSWERS,
                num_warm_up=NUM_WARM_UP,
                num_threads=options.threads,
                **settings,
            )
    rows = {name: validate(options.folder, name) for name in options.models}
    finish({"benchmark": "simulate_validation", "label": "measured and simulated", "models": rows})


def store_of(name: str, folder: Path, config: Path) -> Path:
    if name == "demo":
        from offload_moe.convert.sources import ensure_store

        return ensure_store("demo", codec=None, dense_codec="bf16", revision=None, token=None)
    store = folder / f"{config.stem}-store"
    make("synthesize.py", config, store)
    return store


def validate(folder: Path, name: str) -> dict[str, Any]:
    from simulate_fit import Fitter

    from offload_moe.profile.trace import load_trace

    measured = json.loads((folder / f"{name}.json").read_text())
    fitter = Fitter(measured, load_trace(folder / f"{name}.npz"), num_warm_up=NUM_WARM_UP)
    fitter.fit(FITTED)
    rows = []
    for share in sorted({*FITTED, *VALIDATED} - {1.0}):  # with everything resident there is nothing to simulate
        trials = measured["budgets"][str(share)]
        decode = spread([trial["decode_tokens_per_s"] for trial in trials])
        simulation = fitter.simulate(share)
        row = {
            "share_of_experts": share,
            "num_slots": trials[0]["num_slots"],
            "is_fitted": share in FITTED,
            "measured_decode_tokens_per_s": decode,
            "simulated_decode_tokens_per_s": simulation.decode_tokens_per_s,
            "error": simulation.decode_tokens_per_s / decode["median"] - 1,
            "measured_hit_rate": statistics.median(trial["hit_rate"] for trial in trials),
            "simulated_hit_rate": simulation.hit_rate,
            "measured_stall_s": statistics.median(trial["stall_s"] for trial in trials),
            "simulated_stall_s": simulation.stall_s,
        }
        rows.append(row)
        print_row(name, row)
    errors = [abs(row["error"]) for row in rows if not row["is_fitted"]]
    return {
        "budgets": rows,
        "constants": fitter.constants(),
        "largest_error_of_validated": max(errors),
        "num_validated_within_15_percent": sum(error <= 0.15 for error in errors),
        "num_validated": len(errors),
    }


def print_row(name: str, row: dict[str, Any]) -> None:
    decode = row["measured_decode_tokens_per_s"]
    print(
        f"{name:6s} {row['share_of_experts']:5.0%} {'fitted   ' if row['is_fitted'] else 'validated'} "
        f"measured {decode['median']:6.2f} ({decode['min']:.2f} to {decode['max']:.2f}) tok/s, "
        f"simulated {row['simulated_decode_tokens_per_s']:6.2f}, error {row['error']:+.1%}; "
        f"hit rate {row['measured_hit_rate']:.3f} / {row['simulated_hit_rate']:.3f}; "
        f"stall ms/token {1e3 * row['measured_stall_s']:.1f} / {1e3 * row['simulated_stall_s']:.1f}",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
