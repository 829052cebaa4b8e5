"""A conversation as a JSON file."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from offload_moe.chat.chat_template import Message
from offload_moe.errors import ConfigError
from offload_moe.system.open_files import replace_file
from offload_moe.system.texts import check_text, read_text

FORMAT = "offload-moe chat 1"
ROLES = ("system", "user", "assistant", "tool")


def write_transcript(path: Path, *, system: str | None, messages: Sequence[Message]) -> None:
    """Write the conversation, whole or not at all.

    Raises:
        ConfigError: the file cannot be written, or the system prompt is no text.
    """
    if system is not None:
        check_text(system, "The system prompt")
    document = {"format": FORMAT, "system": system, "messages": list(messages)}
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(document, file, ensure_ascii=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            replace_file(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"Cannot save the conversation to {path}: {error.strerror}. Choose another file.") from error


def read_transcript(path: Path) -> tuple[str | None, list[Message]]:
    """The system prompt and the messages of a saved conversation.

    Raises:
        ConfigError: the file cannot be read or is not a conversation.
    """
    try:
        document = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a saved conversation: it is not JSON ({error}).") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"{path} is not a saved conversation: its format is not '{FORMAT}'.")
    system, messages = document.get("system"), document.get("messages")
    if not (system is None or isinstance(system, str)):
        raise ConfigError(f"{path}: the system prompt is not a text.")
    return system, check_messages(messages, str(path))


def check_messages(messages: object, source: str) -> list[Message]:
    """A copy of the messages. source: where they come from, for messages of errors.

    Raises:
        ConfigError: one has no usable role or no text.
    """
    if not isinstance(messages, list | tuple):
        raise ConfigError(f"{source}: the messages are {type(messages).__name__}, not a list.")
    for number, message in enumerate(messages, 1):
        is_sound = isinstance(message, dict) and all(isinstance(value, str) for value in message.values())
        if not is_sound or message.get("role") not in ROLES or "content" not in message:
            raise ConfigError(
                f"{source}: message {number} is not usable. Each needs a 'role' ({', '.join(ROLES)}) and a text as "
                "'content'."
            )
        for name, text in message.items():
            check_text(text, f"{source}: the {name} of message {number}")
    return [dict(message) for message in messages]
