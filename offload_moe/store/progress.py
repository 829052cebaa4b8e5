"""How long work on a store reports where it stands."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`done_bytes` of `total_bytes` of the present phase."""

    phase: str
    done_bytes: int
    total_bytes: int


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """For callers who asked for no reports."""
