"""How the arguments of a command are read."""

import argparse
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """A parser that accepts an optional PROMPT also after flags, where argparse may already have set it to none.

    And `--speculate draft MODEL` or `--speculate=draft MODEL`, whose last word is the value of `--draft`.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = None if args is None else _with_draft_flag(args)
        options, rest = super().parse_known_args(words, namespace)
        if getattr(options, "prompt", "") is None:
            is_quoted = rest[:1] == ["--"]
            words = rest[1:] if is_quoted else rest
            if len(words) == 1 and (is_quoted or words[0] == "-" or not words[0].startswith("-")):
                options.prompt, rest = words[0], []
        return options, rest


def _with_draft_flag(words: Sequence[str]) -> list[str]:
    found = list(words)
    for at in range(1, len(found)):
        is_draft = found[at - 1] == "--speculate=draft" or found[max(at - 2, 0) : at] == ["--speculate", "draft"]
        if is_draft and not found[at].startswith("-"):
            return [*found[:at], "--draft", *found[at:]]
    return found
