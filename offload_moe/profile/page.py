"""The report as one HTML page: no script, no external resources, every plot with its table."""

from collections.abc import Iterable, Sequence
from html import escape

from offload_moe.profile import plots, sections
from offload_moe.profile.report import ProfileReport
from offload_moe.profile.style import STYLE
from offload_moe.profile.words import Section, Table


def make_page(report: ProfileReport) -> str:
    """The whole page; also well-formed as XML."""
    name = escape(report.model or "routing trace")
    parts = [_section(section, report) for section in sections.make_sections(report)]
    contents = "".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>Profile of {name}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{name}</h1>{_paragraphs(sections.summary(report))}{contents}</main></body></html>\n"
    )


def _section(section: Section, report: ProfileReport) -> str:
    draw = plots.PLOTS.get(section.key)
    drawn = "" if draw is None else "".join(f"<figure>{plot}</figure>" for plot in draw(report))
    tables = "".join(_details(table) for table in section.tables)
    return f"<section><h2>{escape(section.title)}</h2>{_paragraphs(section.lines)}{drawn}{tables}</section>"


def _details(table: Table) -> str:
    opening = '<details open="">' if table.is_open else "<details>"
    return f"{opening}<summary>{escape(table.title)}</summary>{_table(table.columns, table.rows)}</details>"


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
