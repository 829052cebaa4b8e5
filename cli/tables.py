"""The profiler's report and replays on the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .terminal import console, safe

if TYPE_CHECKING:
    from rich.console import Console

    from offload_moe.profile.report import ProfileReport

GAP = 3  # characters between columns
PLENTY = 10_000  # a file or a pipe has no width limit


def print_report(report: "ProfileReport") -> None:
    from offload_moe.profile.sections import make_sections, summary

    out = _wide_console()
    out.print(safe(report.model or "routing trace"), style="bold", soft_wrap=True)
    for line in summary(report):
        out.print(line, soft_wrap=True)
    for section in make_sections(report):
        out.print()
        out.print(section.title, style="bold")
        for line in section.lines:
            out.print(line, soft_wrap=True)
        for table in section.tables:
            _print_table(out, table.title, table.columns, table.rows)


def print_replay(document: dict[str, Any]) -> None:
    """The tables of a replay. document: the result of `replay_report`."""
    out, first = _wide_console(), document["results"][0]
    pool = "one pool for all layers" if first["pool"] == "global" else "slots divided evenly among the layers"
    out.print(
        f"{document['num_tokens']:,} tokens, {document['num_layers']} layers, top-{document['top_k']} of "
        f"{document['num_experts']} experts; {first['num_slots']:,} slots ({first['share']:.1%}), {pool}, cold start.",
        soft_wrap=True,
    )
    rows = [
        [result["policy"], f"{100 * result['hit_rate']:.2f}%", f"{result['num_evictions']:,}"]
        for result in document["results"]
    ]
    _print_table(out, "", ["policy", "hit rate", "evictions"], rows)


def _wide_console() -> "Console":
    out = console()
    if not out.is_terminal:
        out.width = PLENTY
    return out


def _print_table(out: "Console", title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table if the terminal is wide enough, else several; no cell is truncated."""
    from rich import box
    from rich.table import Table

    widths = [max(len(cell) for cell in column) + GAP for column in zip(columns, *rows, strict=True)]
    for group in column_groups(widths, out.width):
        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number in group:
            table.add_column(columns[number], justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*(safe(row[number]) for number in group))
        out.print(table)


def column_groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """Groups of columns that fit side by side; each begins with the first column, which names the rows."""
    groups, left = [[0]], room - widths[0]
    for number, width in enumerate(widths[1:], 1):
        if width > left and len(groups[-1]) > 1:
            groups.append([0])
            left = room - widths[0]
        groups[-1].append(number)
        left -= width
    return groups
