"""Writing an answer while it streams: the answer to stdout, the reasoning dim and apart."""

import sys
from typing import TYPE_CHECKING

from .terminal import console

if TYPE_CHECKING:
    from rich.console import Console

    from offload_moe.chat import Piece

    from .render.screen import Screen


class AnswerWriter:
    """The answer goes to stdout. Reasoning is for people: it goes to `reasoning`, or nowhere.

    On a terminal words are wrapped whole and Markdown is rendered, unless it is to be plain.
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
        """Leave the cursor at the start of a line."""
        if self._kind == "reasoning" and self._reasoning is not None:
            self._reasoning.end()
        else:
            self._answer.end()


class PlainScreen:
    """A file or a pipe: the text as it is, and a new line at its end."""

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
