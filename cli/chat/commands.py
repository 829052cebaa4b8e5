"""The commands of a chat."""

import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from offload_moe.errors import ConfigError
from offload_moe.system.paths import user_path

from ..options import SETTINGS
from ..status import full_statistics, peak_rows
from .talk import Talk

FILE = "FILE"
DEFAULT = "default"


class LeaveError(Exception):
    """A command that leaves the chat."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its argument, its summary, the completions of Tab, whether the argument may span lines, and whether
    the model and its libraries must be there."""

    argument: str
    summary: str
    run: Callable[[Talk, str], None]
    choices: tuple[str, ...] = ()
    takes_lines: bool = False
    needs_model: bool = True


def is_command(message: str) -> bool:
    """Whether a message is a command: one line that begins with one slash. Several lines are pasted text."""
    if not message.startswith("/") or message.startswith("//"):
        return False
    if "\n" not in message.strip():
        return True
    command = COMMANDS.get(message.split(maxsplit=1)[0])
    return command is not None and command.takes_lines


def dispatch(talk: Talk, line: str) -> None:
    """Run one command.

    Raises:
        ConfigError: there is no such command, or its argument is not usable.
        LeaveError: the command leaves the chat.
    """
    name, *argument = line.strip().split(maxsplit=1)
    name = ALIASES.get(name, name)
    command = COMMANDS.get(name)
    if command is None:
        raise ConfigError(
            f"There is no command {name}.{_did_you_mean(name, (*COMMANDS, *ALIASES))} /help lists the commands. Begin "
            "a message with // to send a /."
        )
    if command.needs_model:
        talk.wait()
    command.run(talk, argument[0] if argument else "")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    names = list(known)
    begun = [candidate for candidate in names if len(name) > 1 and candidate.startswith(name)]
    close = begun[:1] or difflib.get_close_matches(name.lower(), names, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _help(talk: Talk, _: str) -> None:
    for name, command in COMMANDS.items():
        names = ", ".join([name, *(alias for alias, meant in ALIASES.items() if meant == name)])
        talk.say(f"{f'{names} {command.argument}'.rstrip():<22} {command.summary}")
    talk.say('A message may span lines: begin and end it with """, or end a line with \\, or paste it.')
    talk.say("Tab completes. Ctrl-C stops an answer, Ctrl-D leaves.")


def _reset(talk: Talk, _: str) -> None:
    talk.session.reset()
    talk.say("A new conversation.")


def _system(talk: Talk, text: str) -> None:
    if text:
        talk.session.system = None if text == "-" else text
        talk.say("System prompt removed." if text == "-" else "System prompt set. It applies from the next answer on.")
    else:
        talk.say(talk.session.system or "There is no system prompt.")


def _set(talk: Talk, text: str) -> None:
    from offload_moe.chat.sampling import RANGES, Sampling

    name, _, value = text.partition(" ")
    if not name:
        for setting in SETTINGS:
            talk.say(f"{setting:<16} {talk.sampling.get(setting, DEFAULT)!s:<10} {RANGES[setting]}")
        return
    if name not in SETTINGS:
        raise ConfigError(
            f"There is no setting {name}.{_did_you_mean(name, SETTINGS)} The settings are {', '.join(SETTINGS)}."
        )
    value = value.strip()
    if not value:
        talk.say(f"{name} is {talk.sampling.get(name, 'the default')}. It may be {RANGES[name]}, or {DEFAULT}.")
        return
    changed = {key: old for key, old in talk.sampling.items() if key != name}
    if value != DEFAULT:
        try:
            changed[name] = SETTINGS[name](value)
        except ValueError:
            raise ConfigError(f"{name} cannot be {value!r}. It must be {RANGES[name]}, or {DEFAULT}.") from None
    Sampling.of(changed)
    talk.sampling = changed
    talk.say(f"{name} is {changed.get(name, 'the default')}.")


def _retry(talk: Talk, _: str) -> None:
    talk.show(talk.session.retry(**talk.sampling))


def _stats(talk: Talk, _: str) -> None:
    rows = [*full_statistics(talk.session.last_stats, talk.model.memory), *peak_rows(talk.model.peaks)]
    width = max(len(name) for name, _ in rows) if rows else 0
    for name, value in rows:
        talk.say(f"{name:<{width}}  {value}")
    if talk.session.last_stats is None:
        talk.say("There is no answer yet.")


def _save(talk: Talk, name: str) -> None:
    # The target of a link is replaced, not the link.
    path = Path(os.path.realpath(_file(name, "/save")))
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"{name} is not a regular file, so no conversation can be written to it. Choose another name."
        )
    if path.exists():
        if talk.confirm is None:
            raise ConfigError(f"{name} exists already. Choose another name, or delete it first.")
        if not talk.confirm(f"{name} exists already. Overwrite it?"):
            talk.say("Not saved.")
            return
    talk.session.save(path)
    talk.say(f"Saved to {name}.")


def _load(talk: Talk, name: str) -> None:
    talk.session.load(_file(name, "/load"))
    talk.say(f"Loaded {len(talk.session.messages)} messages.")


def _exit(talk: Talk, _: str) -> None:
    raise LeaveError


def _file(name: str, command: str) -> Path:
    if not name:
        raise ConfigError(f"{command} needs a file name, for example {command} talk.json.")
    return user_path(name)


COMMANDS = {
    "/help": Command("", "this list", _help, needs_model=False),
    "/reset": Command("", "delete the conversation", _reset),
    "/system": Command("[TEXT]", "show or set the system prompt, - removes it", _system, takes_lines=True),
    "/set": Command("[NAME [VALUE]]", "show or change the sampling", _set, choices=tuple(SETTINGS)),
    "/retry": Command("", "answer the last message again", _retry),
    "/stats": Command("", "time and tokens of the last answer, and the memory in use", _stats),
    "/save": Command(FILE, "write the conversation to a file", _save),
    "/load": Command(FILE, "continue a saved conversation", _load),
    "/exit": Command("", "leave", _exit, needs_model=False),
}
ALIASES = {"/?": "/help", "/quit": "/exit", "/bye": "/exit"}
