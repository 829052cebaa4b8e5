"""Progress reports of long work on a store."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`done_bytes` of `total_bytes` of the current phase; -1 if unknown.

    is_notice: `phase` is a notice for the user instead.
    """

    phase: str
    done_bytes: int
    total_bytes: int
    is_notice: bool = False


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The default report: logs notices and drops the rest."""
    if progress.is_notice:
        logger.warning("%s", progress.phase)


def notice(text: str) -> Progress:
    """Report a notice for the user."""
    return Progress(phase=text, done_bytes=-1, total_bytes=0, is_notice=True)
