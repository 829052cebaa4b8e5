"""Reads at an offset, also on systems without `preadv` (Windows)."""

import os
import threading
from pathlib import Path

from offload_moe.system.open_files import open_descriptor

_POSITION = threading.Lock()  # without `preadv`, threads share the position of a descriptor


def open_for_reading(path: Path) -> int:
    """Raises: OSError."""
    return open_descriptor(path)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read once into the buffer. Returns the number of bytes read; 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    with _POSITION:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)
