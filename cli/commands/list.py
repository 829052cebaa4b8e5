"""`offload-moe list`: the entries of the cache folder."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from offload_moe.system.sizes import format_size

from ..installed import entry_to_json, origin_text, state_text
from ..options import Subparsers
from ..terminal import safe

if TYPE_CHECKING:
    from offload_moe.store.installed import Installed


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "list",
        help="list the installed stores",
        description="List the stores, demo builds and unfinished conversions in the cache folder, with their sizes. "
        "Each can be named in place of a path: offload-moe chat NAME.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    from offload_moe.store.installed import installed
    from offload_moe.system.paths import cache_dir

    entries = installed()
    if options.json:
        print(json.dumps({"cache": str(cache_dir()), "installed": [entry_to_json(e) for e in entries]}, indent=2))
    elif entries:
        _print(entries)
        total = format_size(sum(entry.num_bytes for entry in entries))
        print(f"{len(entries)} in {cache_dir()}, {total}.", file=sys.stderr)
    else:
        print(f"Nothing is installed in {cache_dir()}. Try: offload-moe chat", file=sys.stderr)
    return 0


def _print(entries: "list[Installed]") -> None:
    """Columns as wide as their longest cell, because a name that is wrapped or truncated cannot be copied."""
    rows = [("NAME", "WHAT", "CODEC", "SIZE", "SOURCE")]
    rows += [
        (entry.name, state_text(entry), entry.codec or "", format_size(entry.num_bytes), origin_text(entry))
        for entry in entries
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, what, codec, size, source in rows:
        line = f"{name:<{widths[0]}}  {what:<{widths[1]}}  {codec:<{widths[2]}}  {size:>{widths[3]}}  {source}"
        print(safe(line.rstrip()))
