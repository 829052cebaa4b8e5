"""How long work on a store reports where it stands."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`done_bytes` of `total_bytes` of the present phase, -1 where nobody knows.

    is_notice: `phase` is something that the user must know, beside the work.
    """

    phase: str
    done_bytes: int
    total_bytes: int
    is_notice: bool = False


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """For callers who asked for no reports: notices are logged."""
    if progress.is_notice:
        logger.warning("%s", progress.phase)


def notice(text: str) -> Progress:
    """The report of something that the user must know."""
    return Progress(phase=text, done_bytes=-1, total_bytes=0, is_notice=True)
