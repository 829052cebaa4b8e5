"""`offload-moe profile`: the parts of a token's time, and the hit rates of other policies."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_moe.system.paths import check_writable
from offload_moe.system.progress import Progress
from offload_moe.system.whole_files import write_whole

from ..loading import loaded_model
from ..options import SAMPLING, Subparsers, add_model_flags
from ..progress import reporter
from ..tables import print_replay, print_report

if TYPE_CHECKING:
    from offload_moe.profile.trace import Trace

ALL = "all"
RECORDING_ONLY = ("prompts", "max_new_tokens", "trace")
REPLAYING_ONLY = ("slots", "pool")


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "profile",
        help="show the parts of a token's time, and the hit rates of other policies",
        description="Run prompts on a model and show the parts of a token's time, hits and misses, and the routing; "
        "or replay a recorded trace under other policies and cache sizes.",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="store, GGUF file, checkpoint folder, hub id, or demo"
    )
    group = parser.add_argument_group("recording")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt per line, or JSON lines with prompt and group (default: eight built-in prompts)",
    )
    group.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest answer (default: 64)")
    group.add_argument("--trace", metavar="OUT.npz", help="save the recording")
    group = parser.add_argument_group("replaying")
    group.add_argument(
        "--replay", metavar="TRACE", help="replay this trace; --policy takes a name or all (default: all)"
    )
    group.add_argument(
        "--slots", metavar="N", help="slots in all layers together, or a share such as 25%% (the default)"
    )
    group.add_argument("--pool", choices=("layer", "global"), help="slots per layer, or one pool (default: global)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--html", metavar="OUT.html", help="write the report as one self-contained HTML page")
    add_model_flags(parser)
    parser.set_defaults(**dict.fromkeys(SAMPLING))


def run(options: argparse.Namespace) -> int:
    if (options.model is None) == (options.replay is None):
        options.usage_error("give either a MODEL to run or a trace to --replay")
    for name in RECORDING_ONLY if options.replay else REPLAYING_ONLY:
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            options.usage_error(f"{flag} goes with {'a MODEL' if options.replay else '--replay'}")
    for path in (options.trace, options.html):
        if path is not None:
            check_writable(Path(path))
    return _replay(options) if options.replay else _record(options)


def _record(options: argparse.Namespace) -> int:
    from offload_moe.profile.prompts import BUILT_IN, read_prompts

    prompts = BUILT_IN if options.prompts is None else read_prompts(options.prompts)
    with loaded_model(options) as model, reporter() as report:
        from offload_moe.profile.run import MAX_NEW_TOKENS, run_prompts
        from offload_moe.profile.trace import save_trace

        trace = run_prompts(model, prompts, max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS, progress=report)
        if options.trace is not None:
            save_trace(trace, options.trace)
    _show(options, trace)
    return 0


def _show(options: argparse.Namespace, trace: "Trace") -> None:
    from offload_moe.profile.page import make_page
    from offload_moe.profile.report import make_report, report_to_json

    with reporter() as progress:
        report = make_report(trace, progress=progress)
        if options.html is not None:
            write_whole(Path(options.html), make_page(report).encode())
    if options.json:
        print(json.dumps(report_to_json(report), indent=2))
    else:
        print_report(report)


def _replay(options: argparse.Namespace) -> int:
    with reporter() as progress:
        progress(f"Reading {options.replay}")
        from offload_moe.profile.trace import load_trace

        trace = load_trace(options.replay)
        document = _replays(trace, options, progress)
        if options.html is not None:
            from offload_moe.profile.page import make_page
            from offload_moe.profile.report import make_report

            page = make_page(make_report(trace, progress=progress))
            write_whole(Path(options.html), page.encode())
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        print_replay(document)
    return 0


def _replays(trace: "Trace", options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Replay one policy after the other, so that progress can be shown."""
    from offload_moe.profile.belady import Belady
    from offload_moe.profile.replay import replay_report
    from offload_moe.residency.policy import policy_names

    chosen = options.policy or ALL
    policies = (*policy_names(), Belady.name) if chosen == ALL else (chosen,)
    document: dict[str, Any] = {}
    for number, policy in enumerate(policies):
        progress("Replaying", number / len(policies))
        part = replay_report(trace, [policy], [options.slots or "25%"], [options.pool or "global"])
        document = part | {"results": document.get("results", []) + part["results"]}
    return document


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
