"""The NEON kernels against the portable ones, in an emulator where one is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/emulate_neon"
TOOLS = ("aarch64-linux-gnu-gcc", "qemu-aarch64")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"the NEON kernels need {' and '.join(MISSING)} to be run here")
def test_neon_agrees_with_portable() -> None:
    run = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    for what in ("cases", "activations"):
        assert len(re.findall(rf"panels: 0 of [1-9]\d* {what} have other bits", run.stdout)) == 2
    for what in ("attentions", "sums"):
        assert len(re.findall(rf"vectors: 0 of [1-9]\d* {what} have other bits", run.stdout)) == 2
    assert (
        len(re.findall(r"neon: 0 of [1-9]\d+ cases differ", run.stdout)) == 2
    )  # with and without the dot-product instructions
