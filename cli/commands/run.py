"""`offload-moe run`: one prompt, one answer; stdout carries only the answer."""

import argparse
import sys
from collections.abc import Sequence

from offload_moe.errors import ConfigError

from ..loading import loaded_model
from ..options import (
    Subparsers,
    add_display_flags,
    add_model_flags,
    add_sampling_flags,
    sampling_arguments,
)
from ..prompts import STDIN, join, read_argument, read_files, read_piped_if_ready, read_stdin, wait_for_piped
from ..waiting import show_answer
from ..writer import AnswerWriter


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "run", help="answer one prompt", description="Answer one prompt. Only the answer goes to stdout."
    )
    parser.add_argument("model", metavar="MODEL", help="store, GGUF file, checkpoint folder, hub id, or demo")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="the prompt; piped input comes before it (- or none: stdin is the prompt)",
    )
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        action="append",
        default=[],
        help="text that comes before the prompt, repeatable",
    )
    parser.add_argument("--raw", action="store_true", help="continue the text instead of answering it")
    add_sampling_flags(parser)
    add_model_flags(parser)
    add_display_flags(parser)


def run(options: argparse.Namespace) -> int:
    is_piped = options.prompt == STDIN or (options.prompt is None and not options.file)
    if is_piped and sys.stdin.isatty() and options.prompt is None:
        options.usage_error("give a PROMPT, -f FILE, or pipe one in")
    before = read_files(options.file)
    after = "" if is_piped else read_argument(options.prompt or "", "PROMPT")
    if options.system is not None:
        options.system = read_argument(options.system, "--system")
    piped = read_stdin() if is_piped else read_piped_if_ready()
    prompt = None if piped is None else _prompt(options, before, piped, after)
    with loaded_model(options) as model:
        if prompt is None:
            prompt = _prompt(options, before, wait_for_piped(), after)
        session = model.chat(system=options.system, raw=options.raw)
        if session.notice is not None:
            print(session.notice, file=sys.stderr)
        pieces = session.send(prompt, **sampling_arguments(options))
        show_answer(session, pieces, AnswerWriter(is_plain=options.plain or options.raw))
    return 0


def _prompt(options: argparse.Namespace, before: Sequence[str], piped: str, after: str) -> str:
    text = join([*before, piped, after])
    prompt = text if options.raw else text.strip()
    if not prompt:
        raise ConfigError("The prompt is empty. Give it after the model, pipe it in, or name a file with -f.")
    return prompt
