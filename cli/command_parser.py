"""How the arguments of a command are read."""

import argparse
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """A parser that accepts an optional PROMPT also after flags, where argparse may already have set it to none."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        options, rest = super().parse_known_args(args, namespace)
        if getattr(options, "prompt", "") is None:
            is_quoted = rest[:1] == ["--"]
            words = rest[1:] if is_quoted else rest
            if len(words) == 1 and (is_quoted or words[0] == "-" or not words[0].startswith("-")):
                options.prompt, rest = words[0], []
        return options, rest
