"""Which processor cores this process may use."""

import os
from pathlib import Path

import torch

BINDING_VARIABLES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
PARALLEL_GRAIN = 1 << 15  # elements that torch gives each thread at the least


def usable_cores() -> set[int]:
    """Numbers of the cores; empty where the system does not tell.

    OpenMP, told to bind its threads, leaves the main one a single core: all of its threads have to be asked.
    """
    if not hasattr(os, "sched_getaffinity"):
        return set()
    cores = set(os.sched_getaffinity(0))
    if are_threads_bound():
        torch.ones(torch.get_num_threads() * PARALLEL_GRAIN).sum()  # OpenMP makes its threads with the first work
        for thread in Path("/proc/self/task").glob("[0-9]*"):
            try:
                cores |= os.sched_getaffinity(int(thread.name))
            except OSError:
                continue  # it ended meanwhile
    return cores


def are_threads_bound() -> bool:
    """Whether the user told OpenMP to bind its threads to cores."""
    return any(os.environ.get(name, "false").lower() not in ("", "false") for name in BINDING_VARIABLES)
