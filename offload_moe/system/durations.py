"""Durations with units, as text and in seconds."""

import re

from offload_moe.errors import ConfigError

UNITS_S = {"S": 1, "M": 60, "H": 3600, "D": 86400}
MOST_S = 366 * 86400


def parse_duration(text: str) -> float:
    """``"10m"``, ``"30s"``, ``"1.5h"`` or ``"2d"`` -> seconds. Raises: ConfigError."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([SMHD])\s*", text.upper(), re.ASCII)
    seconds = float(match[1]) * UNITS_S[match[2]] if match is not None else 0.0
    if not 0 < seconds <= MOST_S:
        raise ConfigError(f"Cannot read {text[:40]!r} as a duration. Write it like 30s, 10m or 2h, at most a year.")
    return seconds
