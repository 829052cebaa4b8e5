"""How the arguments of a command are read."""

import argparse
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """A parser that accepts an optional PROMPT also after flags, where argparse may already have set it to none.

    And `--speculate draft MODEL`, whose second word is the value of `--draft`.
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
    for at in range(len(found) - 2):
        if found[at : at + 2] == ["--speculate", "draft"] and not found[at + 2].startswith("-"):
            return [*found[: at + 2], "--draft", *found[at + 2 :]]
    return found
