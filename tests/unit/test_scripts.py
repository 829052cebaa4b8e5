"""What `scripts/` name is there: the scripts themselves take minutes, and `.ci/run` runs their short forms."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def listed(*arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "scripts/delete_waits"), "--list", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_wait_that_is_to_be_deleted_is_found() -> None:
    """A name in the script's tables that no file has any more is an error."""
    deletions = listed()
    assert len(deletions) >= 15
    assert all(re.fullmatch(r"\S+\.py:\d+  .+  ->  .+", line) for line in deletions)


def test_the_fast_form_is_a_sample_of_several_files() -> None:
    fast, files = listed("--fast"), {line.split(":")[0] for line in listed("--fast")}
    assert set(fast) < set(listed())
    assert len(fast) >= len(files) >= 3


def test_the_kernel_tests_that_are_sanitized_exist() -> None:
    named = re.findall(r"tests/\S+?\.py", (ROOT / "scripts/sanitize").read_text())
    assert len(named) >= 4
    assert all(list(ROOT.glob(pattern)) for pattern in named)
