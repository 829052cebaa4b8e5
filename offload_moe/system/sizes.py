"""Sizes with units, as text and as bytes."""

import math
import re

from offload_moe.errors import ConfigError

MOST_BYTES = 1 << 50
MOST_TOKENS = 1 << 31
SURELY_BYTES = 1 << 16  # a larger number without a unit is not a count of GiB
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(size: str | int) -> int:
    """``"10GiB"``, ``"3.5G"``, ``"512MiB"``, ``"0"`` or an int, of bytes -> bytes. Raises: ConfigError."""
    if isinstance(size, int) and not isinstance(size, bool):
        return _bounded(size, str(size))
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)(B?)\s*", str(size).upper(), re.ASCII)
    if match is None:
        raise ConfigError(f"Cannot read {size!r} as a size. Write it like 10GiB, 3.5G or 512MiB.")
    number = float(match[1])
    if number and not match[2] and not match[3]:
        unit = "GiB" if number < SURELY_BYTES else "B"
        raise ConfigError(f"{size!r} has no unit. Did you mean {match[1]}{unit}?")
    return _bounded(number * _UNITS[match[2]], str(size))


def _bounded(num_bytes: float, text: str) -> int:
    if not 0 <= num_bytes <= MOST_BYTES:
        raise ConfigError(f"{text[:40]} is not a size of a memory. It must lie between 0 and {MOST_BYTES >> 40}TiB.")
    return int(num_bytes)


def format_size(num_bytes: float) -> str:
    """Bytes as ``1.2 GiB``, ``34 MiB`` or ``40 KiB``."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


def typed_size(num_bytes: int, *, is_least: bool = False) -> str:
    """Bytes in the form of a flag's value, ``3.5GiB``, rounded down; is_least: a lower bound, rounded up."""
    tenths = num_bytes * 10 / 2**30
    return f"{(math.ceil(tenths) if is_least else math.floor(tenths)) / 10:.1f}GiB"


def parse_tokens(text: str) -> int:
    """A number of tokens, such as 8192 or 8,192. Raises: ConfigError."""
    digits = text.replace(",", "").replace("_", "")
    if not (digits.isascii() and digits.isdigit()) or not 0 < int(digits[:20]) < MOST_TOKENS:
        raise ConfigError(
            f"A context of {text!r} tokens is not usable. It must be a whole number from 1, such as 8192."
        )
    return int(digits)


def parse_port(text: str) -> int:
    """A TCP port. Raises: ConfigError."""
    if not (text.isascii() and text.isdigit()) or int(text[:6]) > 65535:
        raise ConfigError(f"Port {text} is not usable. It must lie between 0 and 65535; 0 takes a free one.")
    return int(text)
