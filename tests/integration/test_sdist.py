"""The source archive, installed: it has all that a machine with a compiler needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE = """
import offload_moe, offload_moe_cli.main, sys
from offload_moe.native.kernels import crc32
assert offload_moe.__file__.startswith(sys.argv[1]), offload_moe.__file__
print(crc32(memoryview(b"a record"), 0), offload_moe_cli.main.main(["--version"]))
"""


@pytest.mark.slow
def test_the_source_archive_installs_and_runs(tmp_path: Path) -> None:
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={tmp_path}/tree/"], cwd=ROOT, check=True)
    build = [sys.executable, "-m", "build", "--quiet", "--sdist", "--no-isolation", "--outdir", tmp_path / "dist"]
    subprocess.run([*build, tmp_path / "tree"], check=True)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    subprocess.run([*pip, archive], check=True)
    environ = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(target)], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("offload-moe ")
