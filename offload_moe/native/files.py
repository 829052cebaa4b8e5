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


def read_fully(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read until the buffer is full or the file ends. Returns the number of bytes read. Raises: OSError."""
    done = 0
    while done < len(buffer) and (count := read_at(descriptor, buffer[done:], offset + done)):
        done += count
    return done
