"""The terminal: its capabilities, and the output that reaches it."""

import logging
import os
import re
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Everything below a space but newline and tab, and the C1 range: a model must not control the terminal.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def is_interactive() -> bool:
    """Whether stdin and stdout are both a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def is_dumb() -> bool:
    """Whether the terminal cannot move its cursor."""
    return os.environ.get("TERM", "") in ("dumb", "unknown")


def console(*, stderr: bool = False) -> "Console":
    """A rich console without markup or highlighting; rich itself honours NO_COLOR and TERM=dumb."""
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            """Leave a broken pipe to `main`; rich would exit with 1."""
            raise

    return PipedConsole(stderr=stderr, markup=False, highlight=False, emoji=False)


def safe(text: str) -> str:
    """Text without control characters."""
    return _CONTROLS.sub("", text)


def quiet_libraries() -> None:
    """Keep the libraries' warnings, logs and progress bars off the terminal. Call it before they are imported."""
    warnings.simplefilter("ignore")
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        **({"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if sys.platform == "linux" else {}),  # caches that grow
    }.items():
        os.environ.setdefault(name, value)
    for name in ("bitsandbytes", "accelerate", "torch", "huggingface_hub", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
