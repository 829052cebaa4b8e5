"""Entry point: choose the command, run it, turn errors into one line and an exit code."""

import argparse
import atexit
import gc
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import offload_moe
from offload_moe.system.names import did_you_mean

from .command_parser import CommandParser
from .commands import COMMANDS
from .completion import COMPLETE, SCRIPTS, candidates, install
from .ending import EndedBySignal, end_beside_load, ended_by_signals
from .failures import one_line
from .streams import discard_unwritten, flush_streams, prepare_streams, say_on_stderr
from .terminal import quiet_libraries, safe

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 success, 1 failure, 2 wrong usage, 130 interrupted, 141 stdout lost its reader.

    143 and 129: ended by SIGTERM and SIGHUP.
    """
    prepare_streams()
    atexit.register(gc.freeze)  # else Python's last search for garbage takes a second in what libraries made
    return end_beside_load(_main(sys.argv[1:] if argv is None else list(argv)))


def _main(arguments: Sequence[str]) -> int:
    try:
        try:
            with ended_by_signals():
                return _run(arguments)
        finally:
            flush_streams()
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError as error:
        say_on_stderr(f"error: {one_line(error)}")
        return EXIT_ERROR
    finally:
        discard_unwritten()


def _run(arguments: Sequence[str]) -> int:
    is_debugging = "--debug" in arguments
    try:
        parser = build_parser()
        if not arguments:
            parser.print_help()
            return EXIT_OK
        if arguments[0] == COMPLETE:
            sys.stdout.writelines(f"{word}\n" for word in candidates(parser, arguments[1:]))
            return EXIT_OK
        _check_command(parser, arguments[0])
        options = parser.parse_args(arguments)
        if not is_debugging:
            quiet_libraries()
        status: int = options.run(options)
    except KeyboardInterrupt:
        say_on_stderr("")
        return EXIT_INTERRUPTED
    except EndedBySignal as ended:
        say_on_stderr(ended.text)
        return ended.status
    except BrokenPipeError:
        raise
    except Exception as error:
        if is_debugging:
            traceback.print_exc()
        print(f"error: {safe(one_line(error))}", file=sys.stderr)
        return EXIT_ERROR
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command. Command modules import heavy packages only when they run."""
    parser = argparse.ArgumentParser(
        prog="offload-moe",
        description="Run large Mixture-of-Experts models: experts in 4 bits on disk, in RAM and on the GPU at once.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--install-completion",
        action=_InstallCompletion,
        nargs="?",
        metavar="SHELL",
        help=f"complete words at the prompt of {', '.join(SCRIPTS)} (default: your shell), and exit",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    for name in COMMANDS:
        module = import_module(f".commands.{name}", __package__)
        module.add_parser(subparsers)
        command = subparsers.choices[name]
        command.add_argument(
            "--debug", action="store_true", help="show the traceback of an error, and the libraries' own messages"
        )
        command.set_defaults(run=module.run, usage_error=command.error)
    return parser


def _check_command(parser: argparse.ArgumentParser, word: str) -> None:
    """Leave with a usage error where the first word is no command; argparse does not say which one it resembles."""
    if word.startswith("-") or word in COMMANDS:
        return
    meant = did_you_mean(word, (*COMMANDS, "--help", "--version"), otherwise="")
    parser.error(
        " ".join(filter(None, (f"there is no command {word!r}.", meant, f"Choose one of: {', '.join(COMMANDS)}.")))
    )


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"offload-moe {offload_moe.__version__}")
        parser.exit()


class _InstallCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, *__: object) -> None:
        path, hint = install(shell)
        print(f"Wrote {path}. {hint}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
