"""Which processor cores this process may use."""

import os
from pathlib import Path

import torch

BINDING_VARIABLES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
PARALLEL_GRAIN = 1 << 15  # torch's minimum of elements per thread


def usable_cores() -> set[int]:
    """Numbers of the usable cores; empty if the system does not provide them.

    If OpenMP binds its threads, the main thread has a single core, so the masks of all threads are joined.
    """
    if not hasattr(os, "sched_getaffinity"):
        return set()
    cores = set(os.sched_getaffinity(0))
    if are_threads_bound():
        # OpenMP creates its threads at the first parallel operation.
        torch.ones(torch.get_num_threads() * PARALLEL_GRAIN).sum()
        for thread in Path("/proc/self/task").glob("[0-9]*"):
            try:
                cores |= os.sched_getaffinity(int(thread.name))
            except OSError:
                continue  # the thread has ended
    return cores


def are_threads_bound() -> bool:
    """Whether the environment makes OpenMP bind its threads to cores."""
    return any(os.environ.get(name, "false").lower() not in ("", "false") for name in BINDING_VARIABLES)
