"""Entry point: choose the command, run it, turn errors into one line and an exit code."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import offload_moe

from .commands import COMMANDS
from .failures import one_line
from .terminal import quiet_libraries

EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0 done, 1 failed, 2 not understood, 130 interrupted, 141 the reader of stdout went away."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    is_debugging = "--debug" in arguments
    try:
        status = _run(arguments, is_debugging=is_debugging)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if is_debugging:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    return status


def _run(arguments: Sequence[str], *, is_debugging: bool) -> int:
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return EXIT_OK
    options = parser.parse_args(arguments)
    if not is_debugging:
        quiet_libraries()
    status: int = options.run(options)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command. Command modules import what is heavy only when they run."""
    parser = argparse.ArgumentParser(
        prog="offload-moe",
        description="Run large Mixture-of-Experts models: experts in 4 bits on disk, in RAM and on the GPU at once.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f".commands.{name}", __package__)
        module.add_parser(subparsers)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"offload-moe {offload_moe.__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
