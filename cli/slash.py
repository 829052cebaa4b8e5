"""The commands one can type in a chat."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offload_moe.errors import ConfigError

from .options import SAMPLING
from .status import full_statistics, peak_rows

if TYPE_CHECKING:
    from .repl import Repl


class LeaveError(Exception):
    """The user wants to leave the chat."""


@dataclass(frozen=True, slots=True)
class Slash:
    """A command: what it takes, what it does."""

    argument: str
    summary: str
    run: "Callable[[Repl, str], None]"


def dispatch(repl: "Repl", line: str) -> None:
    """Run one command.

    Raises:
        ConfigError: there is no such command, or it cannot do what it is asked.
        LeaveError: the user wants to leave.
    """
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        known = " ".join(COMMANDS)
        raise ConfigError(f"There is no command {name}. The commands are {known}. Begin a message with // to send a /.")
    command.run(repl, argument.strip())


def _help(repl: "Repl", _: str) -> None:
    for name, command in COMMANDS.items():
        repl.say(f"{f'{name} {command.argument}'.rstrip():<22} {command.summary}")
    repl.say('A message may span lines: begin and end it with """, or end a line with \\.')
    repl.say("Ctrl-C stops an answer, Ctrl-D leaves.")


def _reset(repl: "Repl", _: str) -> None:
    repl.session.reset()
    repl.say("The conversation begins anew.")


def _system(repl: "Repl", text: str) -> None:
    if text:
        repl.session.system = None if text == "-" else text
        repl.say("System prompt removed." if text == "-" else "System prompt set. It holds from the next answer on.")
    else:
        repl.say(repl.session.system or "There is no system prompt.")


def _set(repl: "Repl", text: str) -> None:
    from offload_moe.chat import Sampling

    name, _, value = text.partition(" ")
    if not name:
        for setting in SAMPLING:
            repl.say(f"{setting:<16} {repl.sampling.get(setting, 'default')}")
        return
    if name not in SAMPLING:
        raise ConfigError(f"There is no setting {name}. The settings are {', '.join(SAMPLING)}.")
    changed = {key: old for key, old in repl.sampling.items() if key != name}
    if value.strip() not in ("", "default"):
        try:
            changed[name] = SAMPLING[name](value)
        except ValueError:
            raise ConfigError(f"{name} cannot be {value.strip()!r}. It must be a number, or default.") from None
    Sampling.of(changed)
    repl.sampling = changed
    repl.say(f"{name} is {changed.get(name, 'the default')}.")


def _retry(repl: "Repl", _: str) -> None:
    repl.show(repl.session.retry(**repl.sampling))


def _stats(repl: "Repl", _: str) -> None:
    rows = [*full_statistics(repl.session.last_stats, repl.model.memory), *peak_rows(repl.model.peaks)]
    width = max(len(name) for name, _ in rows) if rows else 0
    for name, value in rows:
        repl.say(f"{name:<{width}}  {value}")
    if repl.session.last_stats is None:
        repl.say("There is no answer yet.")


def _save(repl: "Repl", path: str) -> None:
    repl.session.save(_file(path, "/save"))
    repl.say(f"Saved to {path}.")


def _load(repl: "Repl", path: str) -> None:
    repl.session.load(_file(path, "/load"))
    repl.say(f"Loaded {len(repl.session.messages)} messages.")


def _exit(repl: "Repl", _: str) -> None:
    raise LeaveError


def _file(path: str, command: str) -> Path:
    if not path:
        raise ConfigError(f"{command} needs a file name, for example {command} talk.json.")
    return Path(path).expanduser()


COMMANDS = {
    "/help": Slash("", "this list", _help),
    "/reset": Slash("", "forget the conversation", _reset),
    "/system": Slash("[TEXT]", "show or set the system prompt, - removes it", _system),
    "/set": Slash("[NAME VALUE]", "show or change how answers are drawn", _set),
    "/retry": Slash("", "answer the last message again", _retry),
    "/stats": Slash("", "what the last answer cost, and the memory in use", _stats),
    "/save": Slash("FILE", "write the conversation to a file", _save),
    "/load": Slash("FILE", "go on with a saved conversation", _load),
    "/exit": Slash("", "leave", _exit),
}
