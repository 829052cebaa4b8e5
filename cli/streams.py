"""The standard streams as a program finds them: closed, in any encoding, with readers that leave."""

import codecs
import io
import os
import sys
from contextlib import suppress

REPLACING = "offload-moe-replace"


def prepare_streams() -> None:
    """Make all three usable. Call it before anything opens a file."""
    _occupy_descriptors()
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
    codecs.register_error(REPLACING, _Replacing())
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, REPLACING), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def flush_streams() -> None:
    """Write what is left. Raises: OSError when it cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def discard_unwritten() -> None:
    """Send what a stream cannot write to nowhere: Python tries again at exit, and complains."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_on_stderr(text: str) -> None:
    """A last word, for whoever still reads it."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def uses_unicode(stream: object) -> bool:
    """Whether a stream takes every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith(("utf-8", "utf8", "utf-16", "utf-32"))


def _occupy_descriptors() -> None:
    """Put the null device where 0, 1 or 2 is closed: a store opened as 1 would be what libraries print into."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


class _Replacing:
    """An error handler that writes `\\u20ac` for what an encoding lacks, and says so once."""

    def __init__(self) -> None:
        self._has_said = False

    def __call__(self, error: UnicodeError) -> tuple[str | bytes, int]:
        if not self._has_said:
            self._has_said = True
            say_on_stderr(
                f"stdout is in {sys.stdout.encoding}, which lacks some of these characters: they are written like "
                "\\u20ac. Set PYTHONIOENCODING=utf-8, or a UTF-8 locale, for the characters themselves."
            )
        return codecs.backslashreplace_errors(error)
