"""Errors as one line."""

import errno
import re
from contextlib import suppress
from pathlib import Path

from offload_moe.errors import ConfigError, OffloadMoeError
from offload_moe.system.paths import cache_dir

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_MEMORY = "Close programs, or raise the limit of this process (`ulimit -v`, a container's)."
# torch's words, and Python's, for what they have no class of their own for.
NOT_ALLOCATED = re.compile(r"can't allocate memory|can't start new thread")
# The dynamic linker's words for a library that does not fit into the address space.
NOT_MAPPED = re.compile(r"failed to map segment|[Cc]annot allocate memory")


def one_line(error: Exception) -> str:
    """Our own errors unchanged, the system's with the file, all others with their class and a hint at --debug."""
    if isinstance(error, OffloadMoeError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return f"There is no memory left for this process. {NO_MEMORY}"
    if isinstance(error, RuntimeError) and (found := NOT_ALLOCATED.search(str(error))):
        return f"There is no memory left for this process ({found[0]}). {NO_MEMORY}"
    if isinstance(error, ImportError) and NOT_MAPPED.search(str(error)):
        return f"There is no memory left to load a library: {error}. {NO_MEMORY}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}{_advice(error)}" if error.filename else error.strerror
    kind, first = type(error).__name__, next(iter(str(error).strip().splitlines()), "")
    return f"{kind}: {first}".removesuffix(": ").rstrip(".") + ". Run again with --debug for the traceback."


def _advice(error: OSError) -> str:
    with suppress(ConfigError):  # without a home folder
        if error.errno in REFUSED and Path(str(error.filename)).is_relative_to(cache_dir()):
            return ". OFFLOAD_MOE_CACHE names another folder for models."
    return ""
