"""The prompt of `run`: files, piped input, and the argument."""

import codecs
import os
import select
import stat
import sys
from collections.abc import Sequence

from offload_moe.errors import ConfigError
from offload_moe.system.paths import user_path
from offload_moe.system.texts import decode, read_bounded, read_text, unescape

from .streams import say_on_stderr

STDIN = "-"
# Counted from the end of loading, so a slow program at the other end of the pipe has had that time as well.
GRACE_S = 10.0


def read_stdin() -> str:
    """Read stdin to its end.

    Raises: ConfigError when it cannot be read or decoded.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    try:
        data: bytes | str = sys.stdin.read() if buffer is None else read_bounded(buffer, "stdin")
    except (OSError, ValueError) as error:
        raise ConfigError(f"stdin cannot be read: {error}. Give the prompt after the model, or -f FILE.") from error
    return data if isinstance(data, str) else decode(data, "stdin", _encoding())


def read_files(names: Sequence[str]) -> list[str]:
    """The texts of files, `-` for stdin. Raises: ConfigError when one cannot be read or decoded."""
    return [read_stdin() if name == STDIN else read_text(user_path(name)) for name in names]


def read_argument(text: str, what: str) -> str:
    """Decode an argument in which Python kept bytes outside the locale's encoding as surrogates.

    Raises: ConfigError when it is not UTF-8 either.
    """
    return unescape(text, what, sys.getfilesystemencoding())


def read_piped_if_ready() -> str | None:
    """Piped input beside a given prompt; None if none has arrived yet.

    Raises: ConfigError when it cannot be decoded.
    """
    if not _may_be_material():
        return ""
    return read_stdin() if _is_ready(0.0) else None


def wait_for_piped() -> str:
    """Read stdin if its first byte arrives within `GRACE_S`: services and `ssh` leave pipes open without writing.

    Raises: ConfigError when it cannot be read or decoded.
    """
    if not _is_ready(0.0):
        say_on_stderr(f"Waiting {GRACE_S:.0f} s for the pipe on stdin. Add </dev/null to skip it.")
    if _is_ready(GRACE_S):
        return read_stdin()
    say_on_stderr("The pipe on stdin is empty and is left out of the prompt. -f - waits for it without a limit.")
    return ""


def join(parts: Sequence[str]) -> str:
    """Join files and piped input, then the instruction, with an empty line between."""
    return "\n\n".join(text for part in parts if (text := part.removesuffix("\n")))


def _may_be_material() -> bool:
    """Whether stdin may carry text for a prompt that is given as well.

    True for a pipe, a socket or a file at its beginning. A file that was partly read may be in use: in `while read
    line; do offload-moe run MODEL "$line"; done < list` it is the rest of the list.
    """
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return os.lseek(descriptor, 0, os.SEEK_CUR) == 0
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _is_ready(timeout_s: float) -> bool:
    """Whether stdin has data, or ends, within that time."""
    try:
        return bool(select.select([sys.stdin], [], [], timeout_s)[0])
    except (OSError, ValueError):
        return True  # on Windows `select` supports only sockets


def _encoding() -> str:
    """The encoding of stdin. An ASCII locale is usually an unset one, so there it is UTF-8."""
    name = codecs.lookup(sys.stdin.encoding or "utf-8").name
    return "utf-8" if name == "ascii" else name
