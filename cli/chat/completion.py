"""Tab in a chat: commands, names of settings, files."""

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from .commands import COMMANDS, FILE


class CommandCompleter(Completer):
    """Completes lines that begin with a slash."""

    def __init__(self) -> None:
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        name, space, argument = line.partition(" ")
        if not space:
            yield from _words(COMMANDS, name)
        elif (command := COMMANDS.get(name)) is None:
            return
        elif command.argument == FILE:
            yield from self._files.get_completions(Document(argument.lstrip()), complete_event)
        else:
            yield from _words(command.choices, argument.lstrip())


def _words(words: Iterable[str], beginning: str) -> Iterable[Completion]:
    return (Completion(word, -len(beginning)) for word in words if word.startswith(beginning))
