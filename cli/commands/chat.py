"""`offload-moe chat`: talk to a model."""

import argparse
from contextlib import ExitStack, nullcontext

from ..chat.keyboard import quiet_keyboard
from ..loading import loaded_model
from ..options import (
    Subparsers,
    add_display_flags,
    add_model_flags,
    add_sampling_flags,
    fill,
    sampling_arguments,
)
from ..prompts import read_argument
from ..terminal import is_interactive


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model. Input may be piped: each line is a turn, and stdout carries the answers only.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="store, GGUF file, checkpoint folder or hub id (default: that of `config`, else demo)",
    )
    add_sampling_flags(parser)
    add_model_flags(parser)
    add_display_flags(parser)


def run(options: argparse.Namespace) -> int:
    fill(options, "model")
    if options.system is not None:
        options.system = read_argument(options.system, "--system")
    with ExitStack() as stack:
        # Keys typed during the load are input of the prompt.
        with quiet_keyboard() if is_interactive() else nullcontext():
            model = stack.enter_context(loaded_model(options))
            session = model.chat(system=options.system)
        from ..chat.repl import run_chat
        from ..chat.talk import Talk

        arguments = sampling_arguments(options)
        talk = Talk(model, session, arguments, is_plain=options.plain, is_debugging=options.debug)
        if talk.is_interactive:
            talk.say(f"{options.model} is ready. /help lists the commands, Ctrl-D leaves the chat.", style="dim")
        if session.notice is not None:
            talk.say(session.notice, style="bold yellow")
        return run_chat(talk)
