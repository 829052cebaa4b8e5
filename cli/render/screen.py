"""An answer on a terminal, as it streams."""

import os
import shutil
import sys
from typing import TYPE_CHECKING, Protocol

from ..terminal import console, safe
from .blocks import first_block_end, make_parser
from .fences import Fence
from .markdown import MarkdownPainter
from .tail import Tail
from .wrap import WordWrapper

if TYPE_CHECKING:
    from rich.console import Console


class Screen(Protocol):
    """Takes the pieces of one text."""

    def write(self, text: str) -> None: ...

    def end(self) -> None:
        """Write the held text, and leave the cursor at the start of a row."""
        ...


def answer_screen(*, is_plain: bool) -> Screen:
    """The display for stdout at a terminal: Markdown if the terminal has colours and `--plain` is not set."""
    is_colourless = "NO_COLOR" in os.environ or os.environ.get("TERM", "") in ("dumb", "unknown")
    return WrappedScreen() if is_plain or is_colourless else MarkdownScreen()


class WrappedScreen:
    """Plain text whose words are not split: to stdout, or dim to a console."""

    def __init__(self, dim: "Console | None" = None) -> None:
        self._dim = dim
        self._wrapper = WordWrapper(lambda: shutil.get_terminal_size().columns)

    def write(self, text: str) -> None:
        self._put(self._wrapper.push(safe(text)))

    def end(self) -> None:
        rest = self._wrapper.flush()
        self._put(rest if self._wrapper.is_at_line_start else f"{rest}\n")
        self._wrapper = WordWrapper(self._wrapper.width)

    def _put(self, text: str) -> None:
        if self._dim is not None:
            self._dim.out(text, style="dim italic", end="")
        else:
            _put(text)


class MarkdownScreen:
    """Renders blocks once they are finished and code line by line; unfinished text is shown plain."""

    def __init__(self) -> None:
        self._parser = make_parser()
        self._painter = MarkdownPainter(console())
        self._tail = Tail()
        self._pending = ""
        self._fence: Fence | None = None
        self._code: list[str] = []

    def write(self, text: str) -> None:
        text = safe(text)
        before, self._pending = self._pending, self._pending + text
        painted = self._paint_finished() if "\n" in text else ""
        self._show(text, before, painted)

    def end(self) -> None:
        before, text = self._pending, "" if self._pending.endswith("\n") or not self._pending else "\n"
        self._pending += text
        painted = self._paint_finished()
        if self._pending:
            painted += self._painter.block(self._pending.rstrip("\n") + "\n") if self._fence is None else ""
            self._pending = ""
        self._show(text, before, painted)

    def _show(self, text: str, before: str, painted: str) -> None:
        if not painted:
            _put(self._tail.push(text))
            return
        erased = self._tail.erase()
        if erased is None:
            num_finished = (before + text).count("\n") - self._pending.count("\n")
            _put(self._tail.push(text))
            self._tail.leave(num_finished)
        else:
            _put(erased + painted + self._tail.push(self._pending))

    def _paint_finished(self) -> str:
        painted = ""
        while part := self._next_part():
            painted += part
        return painted

    def _next_part(self) -> str:
        line, newline, rest = self._pending.partition("\n")
        if not newline:
            return ""
        if self._fence is not None:
            self._pending = rest
            return self._code_line(self._fence, f"{line}\n")
        if (fence := Fence.opened_by(line)) is not None:
            self._pending, self._fence, self._code = rest, fence, []
            return self._painter.fence(line)
        whole = self._pending[: self._pending.rindex("\n") + 1]
        length = first_block_end(self._parser, whole)
        block, self._pending = self._pending[:length], self._pending[length:]
        return self._painter.block(block) if block else ""

    def _code_line(self, fence: Fence, line: str) -> str:
        if fence.is_closed_by(line):
            self._fence = None
            return self._painter.fence(line)
        self._code.append(line)
        return self._painter.code(self._code, fence.language)


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
