"""Numbers for tests of kernels: as bits, with special ones among them."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-41, -1e-41, 3e38, -3e38, 88.0, -104.0], np.float32)


def random_floats(random: np.random.Generator, *shape: int, scale: float = 1.0, num_special: int = 0) -> Floats:
    """num_special: how many of them are NaN, infinite, zero, subnormal or huge."""
    values = (random.standard_normal(shape) * scale).astype(np.float32)
    if num_special:
        places = random.integers(values.size, size=num_special)
        values.reshape(-1)[places] = random.choice(SPECIAL, num_special)
    return values


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def are_same(a: Floats, b: Floats) -> bool:
    """The same bits; NaNs are equal."""
    assert a.shape == b.shape
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def address(array: NDArray[np.generic] | None) -> int | None:
    return None if array is None else array.ctypes.data
