"""Finding the native library, which knows neither torch nor Python. What it computes: `offload_moe.native`."""

import ctypes
import sysconfig
from functools import cache
from pathlib import Path


@cache
def load_library() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, whose calls release the GIL; or None, and why, in one line."""
    path = _path()
    if not path.exists():
        return None, "they were not built; install a C compiler and reinstall the package."
    try:
        return ctypes.CDLL(str(path)), None
    except OSError as error:
        return None, f"{path.name} does not load ({error}); reinstall the package."


@cache
def load_for_short_calls() -> ctypes.PyDLL | None:
    """The same library, whose calls keep the GIL: whoever takes it may need longer than a call of microseconds."""
    return ctypes.PyDLL(str(_path())) if load_library()[0] is not None else None


def _path() -> Path:
    return Path(__file__).with_name(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
