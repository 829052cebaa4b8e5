"""`offload-moe config`: the defaults that the user keeps."""

import argparse
import json
import sys

from offload_moe.system.names import choice
from offload_moe.system.paths import config_file
from offload_moe.system.settings import SETTINGS, read_settings, write_setting

from ..options import Subparsers
from ..terminal import safe

EXIT_FOUND, EXIT_UNSET = 0, 1


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "config",
        help="show or set your defaults",
        description="Show your defaults and where each comes from; with a NAME show its value, with a VALUE set it in "
        "the file of settings. A flag wins over the variable OFFLOAD_MOE_NAME, and that over the file. Exits with 1 if "
        "NAME has no value.",
    )
    parser.add_argument("setting", metavar="NAME", nargs="?", help=f"one of {', '.join(SETTINGS)}")
    parser.add_argument("value", metavar="VALUE", nargs="?", help="the new default")
    parser.add_argument("--unset", action="store_true", help="remove the default from the file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    if options.unset and (options.setting is None or options.value is not None):
        options.usage_error("--unset goes with a NAME alone")
    if options.value is not None or options.unset:
        path = write_setting(options.setting, options.value)
        print(f"Wrote {path}." if path else f"{options.setting} is not in the file of settings.", file=sys.stderr)
        return EXIT_FOUND
    chosen = read_settings()
    if options.setting is not None:
        found = chosen[choice("setting", options.setting, SETTINGS)]
        if found.text:
            print(safe(found.text))
        return EXIT_FOUND if found.text else EXIT_UNSET
    path = config_file()
    if options.json:
        settings = {name: {"value": found.value, "origin": found.origin} for name, found in chosen.items()}
        print(json.dumps({"file": None if path is None else str(path), "settings": settings}, indent=2))
        return EXIT_FOUND
    width = max(len(found.text) for found in chosen.values())
    for name, found in chosen.items():
        print(safe(f"{name:<8} {found.text or '-':<{width}}  {found.origin}"))
    exists = path is not None and path.exists()
    print(
        f"File of settings: {path or 'none, as there is no home folder'}{'' if exists else ' (not there yet)'}",
        file=sys.stderr,
    )
    return EXIT_FOUND
