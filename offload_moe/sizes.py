"""Sizes as people write them."""

import math
import re

from offload_moe.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(size: str | int) -> int:
    """``"10GiB"``, ``"3.5G"``, ``"512MiB"`` or a number of bytes -> bytes. Raises: ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", str(size).upper())
    if match is None:
        raise ConfigError(f"Cannot read {size!r} as a size. Write it like 10GiB, 3.5G or 512MiB.")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(num_bytes: float) -> str:
    """Bytes as ``1.2 GiB``, ``34 MiB`` or ``40 KiB``."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


def typed_size(num_bytes: int, *, is_least: bool = False) -> str:
    """Bytes as they can be typed, ``3.5GiB``, rounded down, or up where it is the least that will do."""
    tenths = num_bytes * 10 / 2**30
    return f"{(math.ceil(tenths) if is_least else math.floor(tenths)) / 10:.1f}GiB"
