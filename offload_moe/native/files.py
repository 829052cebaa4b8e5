"""Reads of open files at an offset, on every system."""

import ctypes
import os

from offload_moe.native.library import load_library
from offload_moe.system import windows


def system_file(descriptor: int) -> int:
    """What the native library reads an open file by: its descriptor; on Windows the system's handle."""
    return windows.handle_of(descriptor) if windows.IS_WINDOWS else descriptor


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read once into the buffer. Returns the number of bytes read; 0 at the end of the file. Raises: OSError."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    if not buffer:
        return 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    count: int = load_library().om_read_file(system_file(descriptor), address, buffer.nbytes, offset)
    if count < 0:
        raise OSError(-count, os.strerror(-count))
    return count


def read_bytes_at(descriptor: int, num_bytes: int, offset: int) -> bytes:
    """At most so many bytes, as one read gives them. Raises: OSError."""
    data = bytearray(num_bytes)
    return bytes(data[: read_at(descriptor, memoryview(data), offset)])
