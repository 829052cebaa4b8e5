"""`offload-moe models`: the supported model families, and how each is verified."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..options import Subparsers
from ..progress import reporter

if TYPE_CHECKING:
    from offload_moe.checkpoint.catalog import Family


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "models",
        help="list the supported model families",
        description="List every family of Mixture-of-Experts models in the installed transformers: whether it is "
        "supported, how that is verified, and its differences. "
        "whole model: the tests compare tiny models of it with transformers, bit for bit, from prompt to decode. "
        "contract only: its experts are compared, but transformers has no text-generating model around them. "
        "refused: loading it is an error with the reason. "
        "FAST PATH: the part of a decode step that native kernels compute with the family's usual settings: all of it "
        "(yes), or the experts only (no). Loading decides for layers that are not declared.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    with reporter() as report:
        report("Loading libraries")
        import transformers

        from offload_moe.checkpoint.catalog import families

        found = families()
    if options.json:
        print(json.dumps({"transformers": transformers.__version__, "families": [_entry(f) for f in found]}, indent=2))
        return 0
    _print(found)
    num_whole = sum(family.verified == "whole model" for family in found)
    print(f"{len(found)} families in transformers {transformers.__version__}, {num_whole} run.", file=sys.stderr)
    return 0


def _entry(family: "Family") -> dict[str, object]:
    return asdict(family) | {"runs": family.verified == "whole model"}


def _print(found: "list[Family]") -> None:
    """Columns as wide as their longest cell, as in `offload-moe list`."""
    rows = [("FAMILY", "VERIFIED", "EXPERTS", "FAST PATH", "SPECIAL")]
    rows += [
        (f.name, f.verified, "adapter" if f.has_adapter else "registry", f.fast_path, ", ".join(f.special))
        for f in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
