"""Loading a model for a command, with its progress on stderr."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from offload_moe.system.names import check_model
from offload_moe.system.progress import Progress

from .imports import importing
from .options import MEMORY, fill, load_arguments, sampling_arguments
from .progress import reporter
from .terminal import console

if TYPE_CHECKING:
    from offload_moe.engine.model import Model


@contextmanager
def loaded_model(options: argparse.Namespace) -> "Iterator[Model]":
    """The model that the flags select, closed at the end. Settings are checked first, as loading may take minutes."""
    model = load_model(options)
    try:
        yield model
    finally:
        model.close()


def load_model(options: argparse.Namespace) -> "Model":
    """The model that the flags select, which the caller closes."""
    check_flags(options)
    with reporter() as report:
        model = read_model(options, report)
    announce(model)
    return model


def check_flags(options: argparse.Namespace) -> None:
    """Find what can be found wrong without libraries, and fill in the user's own defaults."""
    check_model(options.model, options.revision)
    fill(options, *MEMORY)


def read_model(options: argparse.Namespace, report: Progress) -> "Model":
    """Import the libraries, and load the model by checked flags."""
    report("Loading libraries")
    with importing():
        from offload_moe.chat import Sampling
        from offload_moe.engine.load import load
        from offload_moe.engine.options import LoadOptions

    chosen = LoadOptions().updated(load_arguments(options))
    Sampling.of(sampling_arguments(options))
    report(f"Loading {options.model}")
    return load(options.model, chosen, progress=report)


def announce(model: "Model") -> None:
    """Print what a user should see of a load: its notices, and the plan."""
    for notice in model.notices:
        console(stderr=True).print(notice, style="bold yellow", soft_wrap=True)
    print(model.summary, file=sys.stderr)
