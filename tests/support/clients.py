"""Programs that speak to a server, each in a process of its own."""

import os
import subprocess
from pathlib import Path

LIMIT_S = 120


def run_client(command: list[str], folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Without this machine's settings, and without the internet. Raises: AssertionError when it fails."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = kept | {"HOME": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True"} | variables
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done
