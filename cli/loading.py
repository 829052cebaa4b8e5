"""Loading a model for a command, with its progress on stderr."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from offload_moe.system.names import check_model

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
    check_model(options.model, options.revision)
    fill(options, *MEMORY)
    with reporter() as report:
        report("Loading libraries")
        with importing():
            from offload_moe.chat import Sampling
            from offload_moe.engine.load import load
            from offload_moe.engine.options import LoadOptions

        chosen = LoadOptions().updated(load_arguments(options))
        Sampling.of(sampling_arguments(options))
        report(f"Loading {options.model}")
        model = load(options.model, chosen, progress=report)
    for notice in model.notices:
        console(stderr=True).print(notice, style="bold yellow", soft_wrap=True)
    print(model.summary, file=sys.stderr)
    return model
