"""Lives of models in processes of their own: a wrong one would end this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import lifecycle_stress
from support.chat import chat_store

TESTS = Path(__file__).parents[1]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("store"))


def live(store: Path, seed: int, num_rounds: int) -> None:
    command = [sys.executable, "-X", "faulthandler", "-m", lifecycle_stress.__name__]
    command += [str(store), str(seed), str(num_rounds)]
    limit_s = 60 + 20 * num_rounds
    run = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, cwd=TESTS)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr
    assert run.stderr == ""


@needs_fork
def test_models_come_and_go(store: Path) -> None:
    live(store, seed=1, num_rounds=3)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_models_come_and_go_for_long(store: Path, seed: int) -> None:
    live(store, seed, num_rounds=25)
