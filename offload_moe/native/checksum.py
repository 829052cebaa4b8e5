"""CRC-32: the values of zlib, many times as fast."""

import zlib

import numpy as np

from offload_moe.native.bindings import library

LEAST_NATIVE_BYTES = 4096  # below, zlib is as fast


def crc32(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """The checksum of contiguous bytes; start: the checksum of the bytes before them. Releases the GIL."""
    if len(data) < LEAST_NATIVE_BYTES:
        return zlib.crc32(data, start)
    view = np.frombuffer(data, dtype=np.uint8)
    return int(library().om_crc32(view.ctypes.data, view.nbytes, start))
