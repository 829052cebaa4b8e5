"""Finished Markdown blocks as text with colours."""

from collections.abc import Iterator
from typing import ClassVar

from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, ListItem, Markdown, MarkdownElement
from rich.segment import Segment, Segments
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from ..terminal import safe
from .blocks import make_parser

# The terminal's own sixteen colours suit light and dark backgrounds.
CODE_THEME = "ansi_dark"
THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.code_block": "cyan",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold",
        "markdown.h3": "bold",
        "markdown.block_quote": "dim",
    }
)
# Highlighting a line depends on earlier lines; a string that spans more lines than this loses its colour.
NUM_CONTEXT_LINES = 40


class _LeftHeading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _CodeInBlock(CodeBlock):
    """Code inside a list or a quote, at the width that is left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip("\n"), self.lexer_name, theme=CODE_THEME, word_wrap=True)


class _DottedListItem(ListItem):
    def render_number(
        self, console: Console, options: ConsoleOptions, number: int, last_number: int
    ) -> Iterator[Segment]:
        width = len(str(last_number)) + 3
        lines = console.render_lines(self.elements, options.update(width=options.max_width - width), style=self.style)
        for row, line in enumerate(lines):
            yield Segment(f"{number}. ".rjust(width) if row == 0 else " " * width)
            yield from line
            yield Segment.line()


class _Blocks(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "fence": _CodeInBlock,
        "code_block": _CodeInBlock,
        "list_item_open": _DottedListItem,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = tokens


class MarkdownPainter:
    """Renders blocks as text for the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._parser = make_parser()
        self._is_below_blank = False
        console.push_theme(THEME)

    def block(self, text: str) -> str:
        """Render a finished block. Empty lines around it become one empty row."""
        blank_above = "\n" if text.startswith("\n") and not self._is_below_blank else ""
        blank_below = "\n" if text.strip() and text.endswith("\n\n") else ""
        self._is_below_blank = bool(blank_below or (blank_above and not text.strip()))
        return blank_above + self._written(Segments(list(self._rows(text)))) + blank_below

    def _rows(self, text: str) -> Iterator[Segment]:
        tokens = self._parser.parse(text)
        for token in tokens:
            for child in token.children or ():
                if child.type == "softbreak":
                    # Answers use single line breaks on purpose: verses, addresses, logs.
                    child.type, child.tag = "hardbreak", "br"
        rows = [_trimmed(row) for row in self._console.render_lines(_Blocks(tokens), pad=False)]
        shown = [number for number, row in enumerate(rows) if row]
        for row in rows[min(shown, default=0) : max(shown, default=-1) + 1]:
            yield from row
            yield Segment.line()

    def fence(self, line: str) -> str:
        """Render the line that begins or ends a code block."""
        self._is_below_blank = False
        return self._written(Text(line.rstrip("\n"), style="dim"), end="\n")

    def code(self, lines: list[str], language: str) -> str:
        """The last of these lines, highlighted in the context of the others, never wrapped."""
        context = lines[-NUM_CONTEXT_LINES:]
        syntax = Syntax("", language or "text", theme=CODE_THEME)
        # The highlighter drops empty lines at the beginning.
        rows = syntax.highlight("".join(context)).split("\n", allow_blank=True)
        row = rows[len(context) - 1] if len(rows) >= len(context) else Text(context[-1].rstrip("\n"))
        return self._written(row, end="\n")

    def _written(self, renderable: Text | Segments, end: str = "") -> str:
        with self._console.capture() as written:
            self._console.print(renderable, end=end, soft_wrap=True)
        return written.get()


def _trimmed(row: list[Segment]) -> list[Segment]:
    """A row without control characters and without blanks at its end."""
    kept = [Segment(safe(segment.text), segment.style) for segment in row if not segment.control]
    while kept and not kept[-1].text.strip(" ") and not (kept[-1].style and kept[-1].style.bgcolor):
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(" "), kept[-1].style)
    return kept
