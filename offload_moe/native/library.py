"""The native library, which depends on neither torch nor Python. Its kernels: `offload_moe.native`."""

import ctypes
import sys
from functools import cache
from pathlib import Path

from offload_moe.errors import NativeLibraryError
from offload_moe.native import abi


@cache
def load_library() -> ctypes.CDLL:
    """Load the library, whose calls release the GIL. Raises: NativeLibraryError."""
    path = _path()
    if not path.exists():
        raise NativeLibraryError(f"The native library is not built: there is no {path}. {abi.HOW_TO_REBUILD}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(f"The native library does not load: {error}. {abi.HOW_TO_REBUILD}") from error
    abi.check(library)
    abi.declare(library)
    return library


@cache
def load_for_short_calls() -> ctypes.PyDLL:
    """Load the library for calls that keep the GIL: taking it again may last longer than a call of microseconds.

    Raises: NativeLibraryError.
    """
    load_library()
    library = ctypes.PyDLL(str(_path()))
    abi.declare(library)
    return library


def _path() -> Path:
    return Path(__file__).with_name("_native.dll" if sys.platform == "win32" else "_native.so")
