"""Writing an answer while it streams: the answer to stdout, the reasoning dim and apart."""

import sys
from typing import TYPE_CHECKING

from .terminal import console

if TYPE_CHECKING:
    from rich.console import Console

    from offload_moe.chat import Piece

    from .render.screen import Screen


class AnswerWriter:
    """Writes the answer to stdout and the reasoning to `reasoning`, if that is given.

    On a terminal lines are wrapped between words and Markdown is rendered, unless `--plain` is set.
    """

    def __init__(self, reasoning: "Console | None" = None, *, is_plain: bool = False) -> None:
        self._answer = _answer_screen(is_plain=is_plain)
        self._reasoning: Screen | None = None
        if reasoning is None and sys.stderr.isatty():
            reasoning = console(stderr=True)
        if reasoning is not None:
            from .render.screen import WrappedScreen

            self._reasoning = WrappedScreen(reasoning)
        self._kind = ""

    def write(self, piece: "Piece") -> None:
        if piece.kind == "reasoning":
            if self._reasoning is not None:
                self._reasoning.write(piece.text)
                self._kind = piece.kind
            return
        if self._kind == "reasoning" and self._reasoning is not None:
            self._reasoning.end()
            self._reasoning.write("\n")
        self._kind = piece.kind
        self._answer.write(piece.text)

    def end(self) -> None:
        """Finish the text, and leave the cursor at the start of a line."""
        if self._kind == "reasoning" and self._reasoning is not None:
            self._reasoning.end()
        else:
            self._answer.end()


class PlainScreen:
    """For a file or a pipe: the text unchanged, with a newline at its end."""

    def __init__(self) -> None:
        self._is_at_line_start = True

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._is_at_line_start = text.endswith("\n") if text else self._is_at_line_start

    def end(self) -> None:
        if not self._is_at_line_start:
            self.write("\n")


def _answer_screen(*, is_plain: bool) -> "Screen":
    if not sys.stdout.isatty():
        return PlainScreen()
    from .render.screen import answer_screen

    return answer_screen(is_plain=is_plain)
