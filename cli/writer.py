"""Writing an answer while it streams: the answer plain, the reasoning dim and apart."""

import sys
from typing import TYPE_CHECKING

from .terminal import console, safe

if TYPE_CHECKING:
    from rich.console import Console

    from offload_moe.chat import Piece


class AnswerWriter:
    """The answer goes to stdout. Reasoning is for people: it goes to `reasoning`, or nowhere."""

    def __init__(self, reasoning: "Console | None" = None) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._reasoning = reasoning
        if reasoning is None and sys.stderr.isatty():
            self._reasoning = console(stderr=True)
        self._kind = ""
        self._at_line_start = True

    def write(self, piece: "Piece") -> None:
        if piece.kind == "reasoning" and self._reasoning is None:
            return
        if self._kind == "reasoning" and piece.kind == "answer":
            self._put("\n\n" if not self._at_line_start else "\n", "reasoning")
        self._kind = piece.kind
        self._put(safe(piece.text) if self._is_terminal else piece.text, piece.kind)

    def end(self) -> None:
        """Leave the cursor at the start of a line."""
        if not self._at_line_start:
            self._put("\n", self._kind)

    def _put(self, text: str, kind: str) -> None:
        if kind == "reasoning":
            assert self._reasoning is not None
            self._reasoning.out(text, style="dim italic", end="")
        else:
            sys.stdout.write(text)
            sys.stdout.flush()
        if text:
            self._at_line_start = text.endswith("\n")
