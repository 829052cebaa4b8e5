"""`offload-moe chat`: talk to a model."""

import argparse

from ..loading import DEMO, loaded_model
from ..options import Subparsers, add_common_flags, add_model_flags, add_sampling_flags, sampling_arguments
from ..prompts import read_argument
from ..terminal import is_interactive


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model. Piped input works too: each line is a turn, and stdout carries the answers only.",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=DEMO, help="store, checkpoint folder or hub id (default: demo)"
    )
    add_sampling_flags(parser)
    add_model_flags(parser)
    add_common_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.system is not None:
        options.system = read_argument(options.system, "--system")
    with loaded_model(options) as model:
        from ..repl import Repl

        repl = Repl(model, model.chat(system=options.system), sampling_arguments(options), is_debugging=options.debug)
        if is_interactive():
            repl.say(f"{options.model} is ready. /help lists the commands, Ctrl-D leaves.", style="dim")
        if repl.session.notice is not None:
            repl.say(repl.session.notice, style="bold yellow")
        return repl.run()
