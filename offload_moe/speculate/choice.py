"""The values of `speculate`."""

from typing import Literal, get_args

from offload_moe.system.names import choice

Choice = Literal["auto", "off", "ngram", "mtp", "draft"]
CHOICES: tuple[Choice, ...] = get_args(Choice)


def check_choice(name: str) -> Choice:
    """The name, if it is a choice. Raises: ConfigError for another."""
    choice("way to guess tokens", name, CHOICES)
    return name  # type: ignore[return-value]
