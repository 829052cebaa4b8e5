"""`offload-moe doctor`: checks of the machine, and of the engine's results on it."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import offload_moe
from offload_moe.system.paths import check_writable
from offload_moe.system.whole_files import write_whole

from ..options import Subparsers
from ..progress import Reporter, reporter

if TYPE_CHECKING:
    from offload_moe.doctor import Check
    from offload_moe.doctor.outcome import Outcome
    from offload_moe.store import Store

EXIT_WELL, EXIT_PROBLEM = 0, 1


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine",
        description="Check this machine: versions, device, memory, disk, measured bandwidths, each with a verdict "
        "and a remedy. Exits with 1 if there is a problem or a failed test.",
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="run a small model on every path and compare: exactness, overlap, races (under two minutes)",
    )
    parser.add_argument("--store", metavar="STORE", help="check the disk of this store too")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write the results for a bug report, without names, paths or tokens"
    )


def run(options: argparse.Namespace) -> int:
    if options.report:
        check_writable(options.report)
    with reporter() as report:
        report("Loading libraries")
        from offload_moe.doctor import Redactor, examine

        store = _open(options.store)
        report("Checking this machine")
        checks = examine(store)
        where, outcomes = _test(report) if options.self_test else (None, [])
    lines = _lines(checks, outcomes, where)
    if options.json:
        print(json.dumps(_document(checks, outcomes, where), indent=2))
    else:
        print("\n".join(lines))
    if options.report:
        redacted = map(Redactor(), ["offload-moe doctor report", "", *lines])
        write_whole(options.report, ("\n".join(redacted) + "\n").encode())
        print(f"Wrote {options.report}. Read it before you send it.", file=sys.stderr)
    return EXIT_PROBLEM if _num_problems(checks, outcomes) else EXIT_WELL


def _test(report: Reporter) -> "tuple[str, list[Outcome]]":
    from offload_moe.doctor.self_test import describe_device, self_test

    return describe_device(), list(self_test(report))


def _open(name: str | None) -> "Store | None":
    from offload_moe.store import Store
    from offload_moe.system.names import resolve

    return None if name is None else Store.open(resolve(name))


def _lines(checks: "list[Check]", outcomes: "list[Outcome]", where: str | None) -> list[str]:
    width = max(len(name) for name in (*(check.name for check in checks), *(outcome.name for outcome in outcomes)))
    lines = []
    for check in checks:
        lines.append(f"{check.verdict:<8} {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.fix}")
    if where is not None:
        lines += ["", f"Self-test, device tests on {where}:"]
    lines += [f"{outcome.status:<8} {outcome.name:<{width}}  {outcome.found}" for outcome in outcomes]
    return [*lines, "", _verdict(checks, outcomes)]


def _verdict(checks: "list[Check]", outcomes: "list[Outcome]") -> str:
    num_warnings = sum(check.verdict == "warning" for check in checks)
    num_problems = sum(check.verdict == "problem" for check in checks)
    parts = [f"{_count(num_problems, 'problem')}, {_count(num_warnings, 'warning')}"]
    if outcomes:
        num_failed = sum(outcome.status == "fail" for outcome in outcomes)
        num_passed = sum(outcome.status == "pass" for outcome in outcomes)
        seconds = sum(outcome.seconds for outcome in outcomes)
        parts.append(f"self-test: {num_passed} passed, {num_failed} failed, in {seconds:.0f} s")
    return "; ".join(parts) + "."


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _document(checks: "list[Check]", outcomes: "list[Outcome]", where: str | None) -> dict[str, Any]:
    return {
        "version": offload_moe.__version__,
        "is_well": not _num_problems(checks, outcomes),
        "checks": [check.to_json() for check in checks],
        "self_test": None if where is None else {"device": where, "tests": [o.to_json() for o in outcomes]},
    }


def _num_problems(checks: "list[Check]", outcomes: "list[Outcome]") -> int:
    failed = [outcome for outcome in outcomes if outcome.status == "fail"]
    return len([check for check in checks if check.verdict == "problem"]) + len(failed)
