"""The unfinished end of an answer: plain text on the screen that can be erased."""

import re
import shutil
from dataclasses import dataclass

from rich.cells import get_character_cell_size

from .wrap import WordWrapper, lines_of

CURSOR_UP, ERASE_BELOW = "\x1b[{}A", "\x1b[J"
EMOJI_STYLE = "\ufe0f"
UNKNOWN_WIDTH = -1
# Joiners, variation selectors, flags, skin tones.
_JOINED = re.compile("[\u200d\ufe0e\ufe0f\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff]")


@dataclass(frozen=True, slots=True)
class _Line:
    """A source line: its first row, and the terminal's width at that time."""

    row: int
    width: int


class Tail:
    """Counts the rows of the text that it lays out, beginning at the start of a row.

    After a resize the positions of the rows are unknown, and rows that have left the screen cannot be reached. Then
    nothing is erased, and the text stays as it is.
    """

    def __init__(self) -> None:
        self._wrapper = WordWrapper(lambda: shutil.get_terminal_size().columns)
        self._lines: list[_Line] = []
        self._is_line_begun = False
        # Of the last line: its largest possible width, and whether all terminals agree on it.
        self._most_cells, self._is_disputed = 0, False

    def push(self, text: str) -> str:
        """Returns the output that shows more text."""
        shown = ""
        for line in lines_of(text):
            if not self._is_line_begun:
                self._lines.append(_Line(self._wrapper.num_rows, shutil.get_terminal_size().columns))
                self._most_cells, self._is_disputed = 0, False
            self._count_cells(line)
            shown += self._wrapper.push(line)
            self._is_line_begun = not line.endswith("\n")
        return shown

    def _count_cells(self, text: str) -> None:
        """Terminals differ in the width of joined emoji; if that may move a line's end, its rows are unknown."""
        self._most_cells += sum(map(get_character_cell_size, text.rstrip("\n"))) + text.count(EMOJI_STYLE)
        self._is_disputed |= _JOINED.search(text) is not None
        if self._is_disputed and self._most_cells > self._lines[-1].width:
            self._lines[-1] = _Line(self._lines[-1].row, UNKNOWN_WIDTH)

    def erase(self) -> str | None:
        """Returns the output that erases the text; None if it cannot be erased."""
        if not self._lines:
            return ""
        size = shutil.get_terminal_size()
        num_rows = self._wrapper.num_rows - self._lines[0].row
        if num_rows >= size.lines or any(line.width != size.columns for line in self._lines):
            return None
        self._wrapper, self._lines, self._is_line_begun = WordWrapper(self._wrapper.width), [], False
        return "\r" + (CURSOR_UP.format(num_rows) if num_rows else "") + ERASE_BELOW

    def leave(self, num_lines: int) -> None:
        """Drop the first lines, which stay on the screen."""
        del self._lines[:num_lines]
