"""A progress line for a long prompt, and the answer after it."""

import shutil
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from .terminal import is_dumb
from .writer import AnswerWriter

if TYPE_CHECKING:
    from offload_moe.chat import ChatSession, Piece

DELAY_S, INTERVAL_S = 1.0, 0.2


def show_answer(session: "ChatSession", pieces: "Generator[Piece, None, None]", writer: AnswerWriter) -> None:
    """Stream an answer; until it begins, a terminal on stderr shows the progress of the prompt."""
    try:
        with closing(pieces):
            with prompt_progress(session):
                first = next(pieces, None)
            if first is not None:
                writer.write(first)
            for piece in pieces:
                writer.write(piece)
    finally:
        writer.end()


@contextmanager
def prompt_progress(session: "ChatSession") -> Iterator[None]:
    """Update one line on stderr if the context lasts longer than a second, and erase it at the end."""
    if not sys.stderr.isatty():
        yield
        return
    is_over = threading.Event()
    thread = threading.Thread(target=_report, args=(session, is_over), name="offload-moe-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _report(session: "ChatSession", is_over: threading.Event) -> None:
    line = ""
    delay_s = DELAY_S
    while not is_over.wait(delay_s):
        delay_s = INTERVAL_S
        before, line = line, progress_text(*session.prompt_progress)[: shutil.get_terminal_size().columns - 1]
        if line != before:
            _put(f"\r{line:<{len(before)}}\r" if is_dumb() else f"\r{line}\x1b[K")
    if line:
        _put(f"\r{'':<{len(line)}}\r" if is_dumb() else "\r\x1b[K")


def progress_text(num_done: int, num_tokens: int) -> str:
    """`Reading the prompt: 1,024 of 6,200 tokens, 16%`."""
    if not num_tokens:
        return "Waiting"
    return f"Reading the prompt: {num_done:,} of {num_tokens:,} tokens, {num_done / num_tokens:.0%}"


def _put(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
