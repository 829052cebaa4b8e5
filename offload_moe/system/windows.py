"""Windows' own calls for files: opened so that others may rename or delete them, read around the cache, locked.

A file that `os.open` opened cannot be deleted meanwhile, and its locks keep others from reading the locked part.
"""

import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IS_WINDOWS = sys.platform == "win32"

GENERIC_READ, GENERIC_WRITE = 0x80000000, 0x40000000
SHARE_READ_WRITE_DELETE = 7
CREATE_NEW, CREATE_ALWAYS, OPEN_EXISTING, OPEN_ALWAYS, TRUNCATE_EXISTING = 1, 2, 3, 4, 5
NORMAL, NO_BUFFERING, OVERLAPPED = 0x80, 0x20000000, 0x40000000
INVALID_HANDLE = (1 << 64) - 1
LOCK_AT_ONCE, LOCK_EXCLUSIVE = 1, 2
LOCKED_OFFSET = 1 << 30  # times 4 GiB: a lock keeps others from reading what it covers, so it lies behind every file
LOCK_VIOLATION = 33
CLOSING, CLOSING_S = (2, 5, 6), 30.0  # console closed, logged off, shut down; longer than Windows waits
MOST_LETTERS = 248  # of a path, unless it is written in the extended form

_handlers: list[Any] = []


def open_file(path: Path | str, flags: int, *, is_direct: bool = False) -> int:
    """As `os.open` in binary mode; a descriptor. Others may replace or delete the file meanwhile.

    is_direct: reads go around the cache, in whole pages, several at once; `os.read` cannot.

    Raises: OSError.
    """
    import msvcrt

    is_written = bool(flags & (os.O_RDWR | os.O_WRONLY))
    attributes = NORMAL | OVERLAPPED | NO_BUFFERING if is_direct else NORMAL
    access = GENERIC_READ | GENERIC_WRITE if is_written else GENERIC_READ
    handle = kernel().CreateFileW(
        name_of(path), access, SHARE_READ_WRITE_DELETE, None, _disposition(flags), attributes, None
    )
    if handle == INVALID_HANDLE:
        raise last_error(str(path))
    no_inherit: int = getattr(os, "O_NOINHERIT", 0)
    descriptor: int = msvcrt.open_osfhandle(handle, flags & os.O_APPEND | no_inherit)  # type: ignore[attr-defined]
    return descriptor


def handle_of(descriptor: int) -> int:
    """The system's handle of an open file, of which 32 bits count."""
    import msvcrt

    handle: int = msvcrt.get_osfhandle(descriptor)  # type: ignore[attr-defined]
    return handle


def try_lock(descriptor: int, *, is_shared: bool) -> bool:
    """Lock an open file until it is closed. Returns whether no other process has locked it. Raises: OSError."""
    import ctypes

    place = struct.pack("<QQIIQ", 0, 0, 0, LOCKED_OFFSET, 0)  # `OVERLAPPED`: the offset's upper half
    overlapped = ctypes.create_string_buffer(place, len(place))
    flags = LOCK_AT_ONCE | (0 if is_shared else LOCK_EXCLUSIVE)
    if kernel().LockFileEx(handle_of(descriptor), flags, 0, 1, 0, overlapped):
        return True
    error = last_error(None)
    if getattr(error, "winerror", 0) == LOCK_VIOLATION:
        return False
    raise error


def on_closed_console(act: Callable[[], bool]) -> None:
    """Call `act` in a thread when the console is closed or the user logs off. It returns whether the process then ends.

    Windows kills a process as soon as its handler has returned, or after some seconds: so this one waits.
    """
    import ctypes

    def handle(event: int) -> int:
        if event not in CLOSING or not act():
            return 0
        time.sleep(CLOSING_S)
        return 1

    handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint32)(handle)  # type: ignore[attr-defined]
    if kernel().SetConsoleCtrlHandler(handler, 1):
        _handlers[:] = [handler]  # must outlive the call


def name_of(path: Path | str) -> str:
    """A path as the system's calls take it, which on Windows refuse a long one in its usual form."""
    return extended(os.path.abspath(path)) if IS_WINDOWS else os.fspath(path)


def extended(path: str) -> str:
    """An absolute path, in the form that may have more than 260 letters where it needs it."""
    if len(path) < MOST_LETTERS or path.startswith("\\\\?\\"):
        return path
    return "\\\\?\\UNC\\" + path[2:] if path.startswith("\\\\") else "\\\\?\\" + path


def _disposition(flags: int) -> int:
    match bool(flags & os.O_CREAT), bool(flags & os.O_TRUNC):
        case True, _ if flags & os.O_EXCL:
            return CREATE_NEW
        case True, True:
            return CREATE_ALWAYS
        case True, False:
            return OPEN_ALWAYS
        case False, True:
            return TRUNCATE_EXISTING
        case _:
            return OPEN_EXISTING


def kernel() -> Any:
    import ctypes  # not where a command only prints

    library = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    library.CreateFileW.restype = ctypes.c_void_p
    library.CreateFileW.argtypes = (
        *(ctypes.c_wchar_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p),
        *(ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p),
    )
    library.LockFileEx.argtypes = (ctypes.c_void_p, *[ctypes.c_uint32] * 4, ctypes.c_void_p)
    return library


def last_error(path: str | None) -> OSError:
    """The last error of the system, with Python's number of it."""
    import ctypes

    code: int = ctypes.get_last_error()  # type: ignore[attr-defined]
    words: str = ctypes.FormatError(code)  # type: ignore[attr-defined]
    return OSError(0, words.strip(), path, code)
