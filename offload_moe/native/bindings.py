"""Sets the native library up, which is called through ctypes.

Calls through `library` release the GIL; those of `load_for_short_calls`, which are shorter than that takes, keep it.
"""

import ctypes
import os
from functools import cache

import torch

from offload_moe.errors import ConfigError
from offload_moe.native.library import load_library
from offload_moe.system.cores import are_threads_bound, usable_cores
from offload_moe.system.lifecycle import was_forked_with_torch

INSTRUCTION_SETS = ("avx512vbmi", "avx512", "avx512vl", "avxvnni", "avx2", "neon", "portable")
ENVIRONMENT_VARIABLE = "OFFLOAD_MOE_KERNEL"
MAX_THREADS = 256


@cache
def library() -> ctypes.CDLL:
    """The library, with threads and a kernel set. Raises: ConfigError."""
    loaded = load_library()
    if are_threads_bound():  # new threads would inherit the one core of this thread
        cores = sorted(usable_cores())
        loaded.om_use_cores((ctypes.c_int * len(cores))(*cores), len(cores))
    loaded.om_configure_threads(min(torch.get_num_threads(), MAX_THREADS), 0)
    name = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if loaded.om_select(name.encode()) != 0:
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}={name} is not a kernel set that this machine runs. Unset it for the best, or "
            f"choose one of: {', '.join(INSTRUCTION_SETS)}."
        )
    return loaded


def instruction_set() -> str:
    """The kernel set in use: one of INSTRUCTION_SETS."""
    name: bytes = library().om_active_name()
    return name.decode()


def select_instruction_set(name: str | None) -> None:
    """Use this kernel set from the next call on; None for the machine's best. Raises: ConfigError."""
    if name is not None and name not in INSTRUCTION_SETS:
        raise ConfigError(f"Unknown kernel set {name!r}. Choose one of: {', '.join(INSTRUCTION_SETS)}.")
    if library().om_select((name or "").encode()) != 0:
        raise ConfigError(f"This machine cannot run the {name} kernels. Unset {ENVIRONMENT_VARIABLE} for its best.")


def set_threads(num_threads: int, *, pinned_to_cores: bool = False) -> None:
    """Resize the kernels' own thread pool; the calling thread is one of them. Raises: ConfigError."""
    if not 1 <= num_threads <= MAX_THREADS:
        raise ConfigError(f"The kernels cannot use {num_threads} threads. Choose 1 to {MAX_THREADS}.")
    library().om_configure_threads(num_threads, int(pinned_to_cores))


def num_threads() -> int:
    """Threads that a call uses, the caller included."""
    return int(library().om_num_threads())


def use_torch_after_fork() -> None:
    """Make torch usable in a process that was forked from one that used it.

    The threads of OpenMP stay in the parent: the next parallel operation of the thread that forked crashes or hangs.
    With one thread no operation is parallel. The kernels make new threads and keep their number.
    """
    if was_forked_with_torch():
        library()  # whose threads are as many as torch's before the next line
        torch.set_num_threads(1)
