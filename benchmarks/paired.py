"""One benchmark in two checkouts of this project, in turn: what a change costs.

    python benchmarks/paired.py OLD NEW [--trials 10] [--figures PATTERN ...] -- decode_cpu.py --threads 1 ...

OLD and NEW are checkouts with the package installed in a `.venv` each. A trial runs the script once in both; which goes
first alternates. Every figure of the document on the script's last line whose path matches a pattern (a regular
expression, as `runs\\.1\\.decode_cpu_ms`) is compared, NEW over OLD, trial by trial: median, least, greatest, and an
interval that holds the median of such ratios with a confidence of 95%. The last line of stdout is one JSON document.
"""

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import finish, run_json, spread

SIDES = ("old", "new")
CONFIDENCE = 0.95


def main() -> None:
    options = parse()
    checkouts = dict(zip(SIDES, (options.old, options.new), strict=True))
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: {side: [] for side in SIDES})
    for trial in range(options.trials):
        for side in SIDES if trial % 2 == 0 else reversed(SIDES):
            document = run(checkouts[side], options.script)
            for path, value in leaves(document):
                if any(re.search(pattern, path) for pattern in options.figures):
                    figures[path][side].append(value)
                    print(f"{trial} {side} {path} {value:.4g}", file=sys.stderr, flush=True)
    compared = {path: compare(values) for path, values in figures.items()}
    for path, ratio in compared.items():
        low, high = ratio["interval"]
        print(f"{path}: new / old {ratio['median']:.3f} (95%: {low:.3f} to {high:.3f})", file=sys.stderr)
    finish({"benchmark": "paired", "script": options.script, "trials": options.trials, "new_over_old": compared})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--figures", nargs="+", default=["cpu_ms"], metavar="PATTERN")
    parser.add_argument("script", nargs="+", help="a script of benchmarks/ and its arguments, behind --")
    return parser.parse_args()


def run(checkout: Path, script: list[str]) -> Any:
    """What the script says in this checkout."""
    root = checkout.absolute()
    return run_json([str(root / ".venv/bin/python"), str(root / "benchmarks" / script[0]), *script[1:]])


def leaves(document: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a document and where it stands."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield from leaves(value, f"{path}.{name}" if path else str(name))
    elif isinstance(document, list):
        for at, value in enumerate(document):
            yield from leaves(value, f"{path}.{at}")
    elif isinstance(document, int | float) and not isinstance(document, bool):
        yield path, float(document)


def compare(values: dict[str, list[float]]) -> dict[str, Any]:
    ratios = sorted(new / old for old, new in zip(values["old"], values["new"], strict=True))
    return {**spread(ratios), "interval": median_interval(ratios), **{side: spread(values[side]) for side in SIDES}}


def median_interval(ordered: list[float]) -> list[float]:
    """The narrowest pair of these that encloses the median with this confidence, whatever their distribution."""
    count = len(ordered)
    outside = 0.0  # that fewer than `cut` of them lie below the median, or above
    for cut in range(count // 2):
        outside += 2 * math.comb(count, cut) / 2**count
        if outside > 1 - CONFIDENCE:
            return [ordered[max(0, cut - 1)], ordered[count - max(1, cut)]]
    return [ordered[0], ordered[-1]]


if __name__ == "__main__":
    main()
