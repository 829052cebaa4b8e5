"""How long work reports how far it is."""

import logging
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Called with a phase and how much of it is done: bytes of `total` bytes, or a share from 0 to 1 without a total.

    A negative number means that it is not known.
    """

    def __call__(self, phase: str, done: float = -1.0, total: float | None = None) -> None: ...


def silent(phase: str, done: float = -1.0, total: float | None = None) -> None:
    """For callers without a use for reports."""


def log_notice(text: str) -> None:
    """Log a message for the user, where a caller takes no notices."""
    logger.warning("%s", text)
