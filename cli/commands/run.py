"""`offload-moe run`: one prompt, one answer, nothing else on stdout."""

import argparse
import sys

from offload_moe.errors import ConfigError

from ..loading import loaded_model
from ..options import (
    Subparsers,
    add_common_flags,
    add_display_flags,
    add_model_flags,
    add_sampling_flags,
    sampling_arguments,
)
from ..waiting import show_answer
from ..writer import AnswerWriter


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "run", help="answer one prompt", description="Answer one prompt. Only the answer goes to stdout."
    )
    parser.add_argument("model", metavar="MODEL", help="store, checkpoint folder, hub id, or demo")
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt, or - to read it from stdin")
    parser.add_argument("--raw", action="store_true", help="continue the text instead of answering it")
    add_sampling_flags(parser)
    add_model_flags(parser)
    add_display_flags(parser)
    add_common_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    prompt = prompt.removesuffix("\n") if options.raw else prompt.strip()
    if not prompt:
        raise ConfigError("The prompt is empty. Give it after the model, or pipe it in and write - in its place.")
    with loaded_model(options) as model:
        session = model.chat(system=options.system, raw=options.raw)
        if session.notice is not None:
            print(session.notice, file=sys.stderr)
        pieces = session.send(prompt, **sampling_arguments(options))
        show_answer(session, pieces, AnswerWriter(is_plain=options.plain or options.raw))
    return 0
