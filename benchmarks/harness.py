"""What every benchmark shares: alternated trials, medians with their spread, the machine, one JSON line at the end."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "transformers", "bitsandbytes", "numpy")


def alternate(
    candidates: Mapping[str, Callable[[], float]], *, num_trials: int = 5, num_warmups: int = 1
) -> dict[str, list[float]]:
    """Run every candidate once per trial, in turn, so that a machine whose speed drifts treats them alike.

    A candidate returns its own figure (seconds, or tokens per second). The warm-ups are not counted.
    """
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for trial in range(num_warmups + num_trials):
        for name, run in candidates.items():
            value = run()
            if trial >= num_warmups:
                values[name].append(value)
    return values


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def paired_ratio(values: Mapping[str, list[float]], name: str, other: str) -> dict[str, float]:
    """`name` over `other`, trial by trial: what is quoted, because absolute times of a shared machine mean little."""
    return spread([a / b for a, b in zip(values[name], values[other], strict=True)])


def pin_threads(num_threads: int) -> None:
    """One core per thread, for us and for OpenMP; call it before torch is imported."""
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    os.environ["GOMP_CPU_AFFINITY"] = " ".join(map(str, cores))


def machine() -> dict[str, Any]:
    """Where and with what a result was measured."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=True),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "commit": _commit(),
        **{package: version(package) for package in PACKAGES},
    }


def finish(document: Mapping[str, Any]) -> None:
    """Print the result as the last line of stdout."""
    sys.stdout.flush()
    print(json.dumps({**document, "machine": machine()}))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return run.stdout.strip() or "unknown"
