"""`offload-moe rm`: delete a store, a demo build or an unfinished conversion."""

import argparse
import sys

from offload_moe.errors import ConfigError
from offload_moe.system.names import check_installed, is_whole_name
from offload_moe.system.sizes import format_size

from ..installed import state_text
from ..options import Subparsers

EXIT_REMOVED, EXIT_KEPT = 0, 1


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "rm",
        help="delete a store",
        description="Delete a store, a demo build or an unfinished conversion. A folder with other files in it is "
        "refused, and links are not followed.",
    )
    parser.add_argument("name", metavar="STORE", help="a name in `offload-moe list`, or a path")
    parser.add_argument("--yes", action="store_true", help="delete without a confirmation; STORE must be complete")


def run(options: argparse.Namespace) -> int:
    check_installed(options.name)
    from offload_moe.store.installed import find, remove

    entry = find(options.name)
    if options.yes and not is_whole_name(options.name):
        raise ConfigError(f"{options.name} is the beginning of a name. With --yes give the whole one: {entry.name}.")
    if not options.yes:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"{entry.path} needs a confirmation, and stdin is not a terminal. Add --yes to delete it."
            )
        print(
            f"Delete the {state_text(entry)} {entry.path}, {format_size(entry.num_bytes)}? [y/N] ", end="", flush=True
        )
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Nothing was deleted.", file=sys.stderr)
            return EXIT_KEPT
    remove(entry)
    print(f"Deleted {entry.path}, {format_size(entry.num_bytes)}.", file=sys.stderr)
    return EXIT_REMOVED
