"""Parts of a report, and how numbers are written in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of the report.

    rows: text, the first column names the row. is_open: shown at once on the page.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section of the report.

    key: which plots belong to it.
    """

    key: str
    title: str
    lines: Sequence[str]
    tables: Sequence[Table] = field(default_factory=list)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def plain(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
