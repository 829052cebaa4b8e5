"""Wraps streamed text between words at the terminal's width; code blocks stay unchanged."""

import re
from collections.abc import Callable

from rich.cells import cell_len, chop_cells

from .fences import Fence

TAB_CELLS = 8
# Scripts without spaces break between any two characters, but no line begins with closing punctuation.
_IDEOGRAPH = r"[\u2e80-\u2fff\u3040-\ua4cf\uf900-\ufaff\U00020000-\U0003fffd]"
_CLOSING = "[!?.,:;)’”…、。〉》」』】ー！），．：；？]"  # noqa: RUF001
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_UNIT = re.compile(rf"\n|[ \t]+|{_IDEOGRAPH}{_CLOSING}*|(?:(?!{_IDEOGRAPH})\S)+|.", re.DOTALL)


def lines_of(text: str) -> list[str]:
    """The lines with their ends; only a newline ends a line."""
    return _LINE.findall(text)


class WordWrapper:
    """Breaks lines between words. The last word is held until it is complete, because its place depends on its width.

    `num_rows` counts the rows that the cursor has moved down, including line breaks by the terminal itself.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self.width = width
        self._held = ""
        self._space = ""
        self._column = 0
        self._is_line_empty = True
        self._fence: Fence | None = None
        self._code_line = ""
        self._num_breaks = 0

    @property
    def num_rows(self) -> int:
        return self._num_breaks + self._rows_within_line()

    @property
    def is_at_line_start(self) -> bool:
        return self._column == 0 and not self._held

    def push(self, text: str) -> str:
        """Returns the text that can be shown now."""
        self._held += text
        shown = ""
        while self._held and (part := self._next(is_end=False)) is not None:
            shown += part
        return shown

    def flush(self) -> str:
        """Returns the held word."""
        shown = ""
        while self._held:
            shown += self._next(is_end=True) or ""
        return shown

    def _next(self, *, is_end: bool) -> str | None:
        """The next unit to show; None if it is not complete yet."""
        if self._fence is not None:
            return self._code(self._fence, is_end=is_end)
        if self._is_line_empty and self._held.lstrip(" \t")[:1] in ("`", "~", ""):
            return self._line_that_may_open_code(is_end=is_end)
        return self._prose(is_end=is_end)

    def _prose(self, *, is_end: bool) -> str | None:
        match = _UNIT.match(self._held)
        assert match is not None
        unit = match[0]
        if unit == "\n":
            return self._take(unit)
        if match.end() == len(self._held) and not is_end:
            return None
        self._held = self._held[len(unit) :]
        if unit[0] in " \t":
            self._space += unit
            return ""
        return self._place(unit)

    def _place(self, word: str) -> str:
        """The word after the preceding space, or on a line of its own."""
        width = max(self.width(), 1)
        self._is_line_empty = False
        space, self._space = self._space, ""
        end = self._column_after(space) + cell_len(word)
        if end <= width:
            self._column = end
            return space + word
        rows = chop_cells(word, width)
        self._num_breaks += len(rows) - (0 if self._column else 1)
        before = "\n" if self._column else ""
        self._column = cell_len(rows[-1])
        return before + "\n".join(rows)

    def _line_that_may_open_code(self, *, is_end: bool) -> str | None:
        line, newline, _ = self._held.partition("\n")
        mark = line.lstrip(" \t")[:3]
        if not newline and not is_end and (mark in ("", "`", "``", "~", "~~") or Fence.opened_by(line) is not None):
            return None
        self._fence = Fence.opened_by(line) if newline else None
        if self._fence is not None:
            return self._take(line + newline)
        self._is_line_empty = False
        return ""

    def _code(self, fence: Fence, *, is_end: bool) -> str | None:
        line, newline, _ = self._held.partition("\n")
        if not newline and not is_end and fence.may_be_closed_by(self._code_line + line):
            return None
        if newline and fence.is_closed_by(self._code_line + line):
            self._fence = None
        self._code_line = "" if newline else self._code_line + line
        return self._take(line + newline)

    def _take(self, line: str) -> str:
        """Show the beginning of the held text unchanged: a line, its end, or a part of it."""
        self._held = self._held[len(line) :]
        self._space = ""
        self._column = self._column + cell_len(line.rstrip("\n"))
        if line.endswith("\n"):
            self._num_breaks += self._rows_within_line() + 1
            self._column, self._is_line_empty = 0, True
        return line

    def _rows_within_line(self) -> int:
        return max(self._column - 1, 0) // max(self.width(), 1)

    def _column_after(self, space: str) -> int:
        column = self._column
        for letter in space:
            column += TAB_CELLS - column % TAB_CELLS if letter == "\t" else 1
        return column
