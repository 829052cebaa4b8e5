"""The native CRC-32 gives zlib's numbers for every length, alignment and start."""

import zlib

import numpy as np
import pytest

from offload_moe.native import checksum, kernels


@pytest.mark.parametrize("length", [0, 1, 15, 16, 63, 64, 65, 127, 128, 4095, 4096, 4097, 65_537, 1_000_003])
def test_it_is_the_checksum_of_zlib(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "LEAST_NATIVE_BYTES", 1)
    data = np.random.default_rng(length).bytes(length + 5)
    for start in (0, 1, 0xDEADBEEF):
        for shift in (0, 1, 5):
            piece = memoryview(data)[shift : shift + length]
            assert kernels.crc32(piece, start) == zlib.crc32(piece, start)
