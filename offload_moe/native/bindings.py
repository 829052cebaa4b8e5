"""Setting the native library up. It is called through ctypes, which releases the GIL for each call."""

import ctypes
import os
from functools import cache

import torch

from offload_moe.errors import ConfigError
from offload_moe.native.library import load_library
from offload_moe.system.cores import are_threads_bound, usable_cores
from offload_moe.system.lifecycle import was_forked_with_torch

INSTRUCTION_SETS = ("avx512vbmi", "avx512", "avx2", "neon", "portable")
ENVIRONMENT_VARIABLE = "OFFLOAD_MOE_KERNEL"
MAX_THREADS = 256


def available() -> bool:
    """Whether the native library was built and loads."""
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """Why `available()` is False, in one line; None when it is True."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library. Raises: ConfigError when there is none."""
    loaded, reason = _load()
    if loaded is None:
        raise ConfigError(f"The native CPU kernels are not available: {reason}")
    return loaded


def instruction_set() -> str:
    """The kernel set in use: `avx512`, `avx2`, `neon` or `portable`."""
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

    The threads of OpenMP stayed in the parent: the next parallel operation of the thread that forked crashes or hangs.
    With one thread there is none. The kernels, which make their threads anew, keep as many.
    """
    if was_forked_with_torch():
        available()  # so that they have been given as many as torch had
        torch.set_num_threads(1)


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    loaded, reason = load_library()
    if loaded is None:
        return None, reason
    _declare(loaded)
    if are_threads_bound():  # else new threads would inherit the one core of this thread
        cores = sorted(usable_cores())
        loaded.om_use_cores((ctypes.c_int * len(cores))(*cores), len(cores))
    loaded.om_configure_threads(min(torch.get_num_threads(), MAX_THREADS), 0)
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if loaded.om_select(wanted.encode()) != 0:
        return None, f"{ENVIRONMENT_VARIABLE}={wanted} is not a kernel set that this machine runs."
    return loaded, None


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    loaded.om_select.argtypes = [ctypes.c_char_p]
    loaded.om_active_name.restype = ctypes.c_char_p
    loaded.om_configure_threads.argtypes = [ctypes.c_int, ctypes.c_int]
    loaded.om_use_cores.argtypes, loaded.om_use_cores.restype = [pointer, ctypes.c_int], None
    loaded.om_crc32.argtypes, loaded.om_crc32.restype = [pointer, int64, ctypes.c_uint32], ctypes.c_uint32
    for encoder in (loaded.om_encode_nf4, loaded.om_encode_int8):
        encoder.argtypes, encoder.restype = [pointer, int32, int64, pointer, pointer], None
    loaded.om_encode_nested.argtypes = [pointer, ctypes.c_float, int64, pointer, pointer]
    loaded.om_encode_nested.restype = None
    loaded.om_attention_step.argtypes = [*([pointer] * 6), int64, int64, pointer]
    loaded.om_rms_norm.argtypes, loaded.om_rms_norm.restype = [pointer, pointer, int64, ctypes.c_float, pointer], None
    loaded.om_router_step.argtypes = [pointer] * 5
    loaded.om_layer_step.argtypes = [*([pointer] * 6), int64, int64, *([pointer] * 5)]
    loaded.om_add_shared.argtypes = [pointer] * 3
    loaded.om_slot_table_open.argtypes, loaded.om_slot_table_open.restype = [pointer] * 2, pointer
    loaded.om_slot_table_close.argtypes, loaded.om_slot_table_close.restype = [pointer], None
    loaded.om_slot_table_publish.argtypes, loaded.om_slot_table_publish.restype = [pointer, int64, pointer], None
    loaded.om_slot_table_claim.argtypes = loaded.om_slot_table_withdraw.argtypes = [pointer, int64]
    loaded.om_reads_open.argtypes, loaded.om_reads_open.restype = [pointer] * 2, pointer
    loaded.om_reads_close.argtypes = [pointer, ctypes.c_double]
    loaded.om_reads_reserve.argtypes, loaded.om_reads_reserve.restype = [pointer, int32, pointer], None
    loaded.om_reads_ask_below.argtypes, loaded.om_reads_ask_below.restype = [pointer, int32], None
    loaded.om_reads_demand.argtypes, loaded.om_reads_demand.restype = [pointer, int64], None
    loaded.om_reads_reclaim.argtypes = [pointer]
    loaded.om_reads_completions.argtypes, loaded.om_reads_completions.restype = [pointer, pointer, int64], int64
    loaded.om_span_pass.argtypes, loaded.om_span_pass.restype = [pointer] * 3, int64
    loaded.om_pass_start.argtypes, loaded.om_pass_start.restype = [pointer] * 4, pointer
    loaded.om_pass_next.argtypes = [pointer, int64, ctypes.c_double, pointer]
    loaded.om_pass_next.restype = int64
    loaded.om_pass_end.argtypes, loaded.om_pass_end.restype = [pointer], None
    loaded.om_linear_forward.argtypes = [pointer, pointer, pointer, int64, pointer, int64, int32, int32, int32]
    loaded.om_moe_forward.argtypes = [
        *(pointer, pointer, int64, int32),
        *(pointer, pointer, pointer, pointer, pointer, int64),
        *(pointer, int32, int32, int32),
    ]
    loaded.om_sum_rows.argtypes, loaded.om_sum_rows.restype = [pointer, int64, int64, pointer, int32], None
