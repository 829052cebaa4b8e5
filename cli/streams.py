"""The standard streams, which may be closed, in any encoding, or lose their reader."""

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

REPLACING = "offload-moe-replace"


def prepare_streams() -> None:
    """Make all three streams usable. Must be called before any file is opened."""
    _occupy_descriptors()
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
    codecs.register_error(REPLACING, _Replacing())
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, REPLACING), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr = cast(TextIO, _Expendable(sys.stderr))


def flush_streams() -> None:
    """Flush both streams. Raises: OSError when a stream cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def discard_unwritten() -> None:
    """Discard data that cannot be written, because Python tries again at exit and prints an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard(stream)


def say_on_stderr(text: str) -> None:
    """Print a last line to stderr if it still has a reader."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def uses_unicode(stream: object) -> bool:
    """Whether a stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith(("utf-8", "utf8", "utf-16", "utf-32"))


def _discard(stream: TextIO) -> None:
    """Send what a stream still holds, and what follows, to the null device."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _occupy_descriptors() -> None:
    """Open the null device in place of a closed 0, 1 or 2: libraries would print into a store that is opened as 1."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


class _Expendable:
    """A stream whose text is lost where it cannot be written: a full or closed stderr must not end an answer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            _discard(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _discard(self._stream)


class _Replacing:
    """An error handler that writes `\\u20ac` for characters that the encoding lacks, with one notice."""

    def __init__(self) -> None:
        self._has_said = False

    def __call__(self, error: UnicodeError) -> tuple[str | bytes, int]:
        if not self._has_said:
            self._has_said = True
            say_on_stderr(
                f"stdout is in {sys.stdout.encoding}, which lacks some of these characters: they are written like "
                "\\u20ac. Set PYTHONIOENCODING=utf-8, or a UTF-8 locale, to write them."
            )
        return codecs.backslashreplace_errors(error)
