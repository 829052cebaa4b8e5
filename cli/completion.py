"""Completion in a shell: what may follow the words of a command, and the scripts that show it."""

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from offload_moe.errors import ConfigError, OffloadMoeError
from offload_moe.system.folders import make_folder
from offload_moe.system.names import DEMO, all_names, choice
from offload_moe.system.paths import user_path
from offload_moe.system.settings import SETTINGS
from offload_moe.system.whole_files import write_whole

from .options import policies

COMPLETE = "--complete"  # followed by the words behind `offload-moe`, the last of which is being written
BASH = r"""_offload_moe() {
    local IFS=$'\n' words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    COMPREPLY=($(offload-moe --complete "${words[@]//[\\\"\']/}" 2>/dev/null))
    case ${COMPREPLY[*]} in *[!A-Za-z0-9_./$'\n'-]*) compopt -o filenames 2>/dev/null ;; esac # quotes
}
complete -o default -F _offload_moe offload-moe
"""
ZSH = r"""#compdef offload-moe
local -a found
found=(${(f)"$(offload-moe --complete "${(@)words[2,CURRENT]//[\\\"\']/}" 2>/dev/null)"})
if (( $#found )); then compadd -a found; else _files; fi
"""
FISH = r"""function __offload_moe_complete
    set -l words (commandline -opc)[2..-1] (commandline -ct)
    set -l found (offload-moe --complete (string replace --all --regex "[\\\\\"']" "" -- $words) 2>/dev/null)
    if set -q found[1]
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c offload-moe -f -a '(__offload_moe_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
LOADED = "New shells complete the words of offload-moe."
HINTS = {
    "bash": f"{LOADED} If they do not, the package bash-completion is missing: add `source {{path}}` to ~/.bashrc.",
    "zsh": "Add to ~/.zshrc, before compinit is called: fpath=({folder} $fpath)",
    "fish": LOADED,
}


def candidates(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """What may stand in place of the last of the words; none where the shell may offer files.

    A value behind `--flag=` is one word with its flag (zsh, fish), or a word of its own behind a word `=` (bash).
    """
    *before, begun = words or [""]
    flag, equals, value = begun.partition("=")
    if equals and flag.startswith("--"):
        return [f"{flag}={found}" for found in candidates(parser, [*before, flag, value])]
    before, begun = [word for word in before if word != "="], begun.removeprefix("=")
    if not before:
        return _beginning(begun, _flags(parser) if begun.startswith("-") else _commands(parser))
    command = _commands(parser).get(before[0])
    if command is None:
        return []
    awaited, num_values = _read(command, before[1:])
    if awaited is not None:
        return _beginning(begun, _values(awaited))
    if begun.startswith("-"):
        return _beginning(begun, _flags(command))
    places = [action for action in command._actions if not action.option_strings]
    return _beginning(begun, _values(places[num_values])) if num_values < len(places) else []


def install(shell: str | None, environ: Mapping[str, str] | None = None) -> tuple[Path, str]:
    """Write the script of a shell, by default that of the user, where it finds it; returns the file and a hint.

    Raises: ConfigError for another shell; OSError.
    """
    environ = os.environ if environ is None else environ
    name = Path(environ.get("SHELL", "")).name if shell is None else shell
    if shell is None and name not in SCRIPTS:
        raise ConfigError(f"SHELL names no shell that can complete. Name it: --install-completion {'|'.join(SCRIPTS)}")
    path = _place(choice("shell", name, SCRIPTS), environ)
    make_folder(path.parent)
    write_whole(path, SCRIPTS[name].encode())
    return path, HINTS[name].format(path=path, folder=path.parent)


def _place(shell: str, environ: Mapping[str, str]) -> Path:
    data = environ.get("XDG_DATA_HOME") or user_path("~/.local/share")
    if shell == "fish":
        return Path(environ.get("XDG_CONFIG_HOME") or user_path("~/.config"), "fish/completions/offload-moe.fish")
    if shell == "zsh":
        return Path(data, "zsh/site-functions/_offload-moe")
    return Path(environ.get("BASH_COMPLETION_USER_DIR") or Path(data, "bash-completion"), "completions/offload-moe")


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings}


def _read(command: argparse.ArgumentParser, words: Iterable[str]) -> tuple[argparse.Action | None, int]:
    """The flag whose value comes next, and how many positional values have been read."""
    flags = _flags(command)
    awaited, num_values = None, 0
    for word in words:
        if awaited is not None:
            awaited = None
        elif word.startswith("-") and len(word) > 1:
            action = flags.get(word)
            awaited = action if action is not None and action.nargs != 0 else None
        else:
            num_values += 1
    return awaited, num_values


def _values(action: argparse.Action) -> Iterable[str]:
    if action.choices is not None:
        return map(str, action.choices)
    if action.dest == "policy":
        return policies()
    if action.metavar in ("MODEL", "STORE"):
        return _models()
    return SETTINGS if action.dest == "setting" else ()


def _models() -> Iterator[str]:
    yield DEMO
    try:
        yield from all_names()
    except (OffloadMoeError, OSError):
        return


def _beginning(begun: str, words: Iterable[str]) -> list[str]:
    return sorted({word for word in words if word.startswith(begun)})
