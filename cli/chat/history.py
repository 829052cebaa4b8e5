"""The typed messages, kept between runs: one JSON string per line, appended, so that several chats share a file."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import History

from offload_moe.system.folders import make_folder

MAX_MESSAGES = 1000
MAX_READ_BYTES = 4 << 20


class MessageHistory(History):
    """The history file. Errors never stop a chat: lines that cannot be read or written are left out."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """The last messages, newest first."""
        messages = [message for line in reversed(self._lines()) if (message := _message(line)) is not None]
        return messages[:MAX_MESSAGES]

    def store_string(self, string: str) -> None:
        """Append in one write, because the system does not interleave single writes of several processes."""
        line = json.dumps(string) + "\n"
        with suppress(OSError):
            make_folder(self._path.parent)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            file = os.open(self._path, flags, 0o600)
            try:
                os.write(file, (("" if _ends_a_line(file) else "\n") + line).encode())
            finally:
                os.close(file)

    def _lines(self) -> list[bytes]:
        if not self._path.is_file():
            return []
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - MAX_READ_BYTES, 0))
            return file.read().split(b"\n")
        return []


def _message(line: bytes) -> str | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, str) and message else None


def _ends_a_line(file: int) -> bool:
    """Whether the file ends with a newline: a killed chat may have left an incomplete line."""
    size = os.lseek(file, 0, os.SEEK_END)
    if size == 0:
        return True
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1) == b"\n"
