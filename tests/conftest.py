"""Shared by all tests: tiny models are fastest, and timings steadiest, on one thread."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload_moe.native import kernels
from offload_moe.system import extensions
from tests.support.extensions import Site, write_example

torch.set_num_threads(1)
os.environ["OFFLOAD_MOE_CONFIG"] = os.devnull  # no test depends on the defaults of who runs it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep modules out of later garbage collections: each `load` collects, in 0.2 s with all that tests import."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def best_kernels_afterwards() -> Iterator[None]:
    """A test may choose a kernel set and a number of threads."""
    before = kernels.num_threads()
    yield
    kernels.select_instruction_set(None)
    kernels.set_threads(before)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A folder on the import path that packages can be installed into."""
    yield Site(tmp_path / "site", monkeypatch)
    extensions.installed.cache_clear()


@pytest.fixture
def example(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The extensions of `examples/extension`, installed."""
    write_example(site, monkeypatch)
    return site
