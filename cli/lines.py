"""Reading messages: single lines, `\"\"\"` blocks and lines that end in a backslash."""

import sys
from collections.abc import Callable
from contextlib import suppress

from offload_moe.errors import ConfigError
from offload_moe.system.texts import unescape

QUOTES = '"""'
PROMPT, CONTINUATION = "> ", ". "


def read_message(read_line: Callable[[str], str]) -> str:
    """The next message.

    Raises:
        EOFError: the input has ended, and no message has begun.
        UnreadableMessageError: the message is in another encoding; the next one can be read.
    """
    message = _read_message(read_line)
    try:
        return unescape(message, "This message", getattr(sys.stdin, "encoding", None) or "utf-8")
    except ConfigError as error:
        raise UnreadableMessageError(str(error)) from None


def _read_message(read_line: Callable[[str], str]) -> str:
    line = read_line(PROMPT)
    if line.lstrip().startswith(QUOTES):
        return _read_block(line.lstrip()[len(QUOTES) :], read_line)
    lines = [line]
    with suppress(EOFError):
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(read_line(CONTINUATION))
    return "\n".join(lines)


class UnreadableMessageError(ConfigError):
    """A message that cannot be decoded."""


def _read_block(first: str, read_line: Callable[[str], str]) -> str:
    lines = [first]
    with suppress(EOFError):
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(read_line(CONTINUATION))
        lines[-1] = lines[-1].rstrip()[: -len(QUOTES)]
    return "\n".join(lines).strip("\n")


def read_piped_line(_: str) -> str:
    """A line of stdin that is no terminal; no prompt is shown."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removeprefix("\ufeff").rstrip("\n")
