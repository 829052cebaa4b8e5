"""`offload-moe chat`: talk to a model."""

import argparse
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING

from offload_moe.system.progress import Progress

from ..chat.keyboard import quiet_keyboard
from ..chat.opening import Opened, Opening
from ..chat.repl import run_chat
from ..chat.talk import Talk
from ..loading import announce, check_flags, loaded_model, read_model
from ..options import (
    Subparsers,
    add_display_flags,
    add_model_flags,
    add_sampling_flags,
    fill,
    sampling_arguments,
)
from ..prompts import read_argument
from ..terminal import is_dumb, is_interactive

if TYPE_CHECKING:
    from offload_moe.chat import ChatSession
    from offload_moe.engine.model import Model


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
    if is_interactive() and not is_dumb() and not options.debug:
        return _while_loading(options)
    with ExitStack() as stack:
        # Keys typed during the load are input of the prompt.
        with quiet_keyboard() if is_interactive() else nullcontext():
            opened = _opened(options, stack.enter_context(loaded_model(options)))
        talk = _talk(options, lambda: opened)
        _greet(talk, options.model, opened.session)
        return run_chat(talk)


def _while_loading(options: argparse.Namespace) -> int:
    """Show the prompt at once. Libraries' own messages, which --debug shows, would be written into it."""
    check_flags(options)
    with quiet_keyboard():
        import_module("..chat.prompt", __package__)

    def load(report: Progress) -> Opened:
        return _opened(options, read_model(options, report))

    def greet(opened: Opened) -> None:
        announce(opened.model)
        _greet(talk, options.model, opened.session)

    with Opening(load, greet) as opening:
        talk = _talk(options, opening.result)
        return run_chat(talk, opening)


def _opened(options: argparse.Namespace, model: "Model") -> Opened:
    return Opened(model, model.chat(system=options.system))


def _talk(options: argparse.Namespace, opened: Callable[[], Opened]) -> Talk:
    return Talk(opened, sampling_arguments(options), is_plain=options.plain, is_debugging=options.debug)


def _greet(talk: Talk, name: str, session: "ChatSession") -> None:
    if talk.is_interactive:
        talk.say(f"{name} is ready. /help lists the commands, Ctrl-D leaves the chat.", style="dim")
    if session.notice is not None:
        talk.say(session.notice, style="bold yellow")
