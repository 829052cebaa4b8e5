"""`scripts/card`: a part that fails or hangs is recorded, and what is to be retuned follows its rules."""

import os
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "card"
LONG = (
    "import subprocess, sys; print('half', file=sys.stderr, flush=True); "
    "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("card_script", str(SCRIPT))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module, before = module_from_spec(spec), [*sys.path]
    loader.exec_module(module)
    sys.path[:] = before
    return module


def test_a_part_says_what_it_found(script: ModuleType) -> None:
    found = script.run([sys.executable, "-c", """print("a line"); print('{"rate": 3}')"""], 30, dict(os.environ))
    assert found["rate"] == 3
    assert 0 <= found["seconds"] < 30


@pytest.mark.parametrize(
    ("program", "reason"),
    [("raise SystemExit('no driver')", "no driver"), ("import os; os._exit(7)", "it ended with 7")],
)
def test_a_part_that_fails_is_recorded(program: str, reason: str, script: ModuleType) -> None:
    assert script.run([sys.executable, "-c", program], 30, dict(os.environ))["failed"] == reason


def test_what_a_part_has_said_is_kept_without_the_folder(script: ModuleType) -> None:
    program = f"import sys; print('{script.ROOT}/scripts/card: line 3', file=sys.stderr); raise ValueError('no driver')"
    found = script.run([sys.executable, "-c", program], 30, dict(os.environ))
    assert found["failed"] == "ValueError: no driver"
    assert found["until_then"].startswith("scripts/card: line 3")


def test_a_part_that_hangs_is_ended_with_all_that_it_has_started(script: ModuleType) -> None:
    began = time.monotonic()
    found = script.run([sys.executable, "-c", LONG], 1.5, dict(os.environ))
    assert found["failed"] == "not done after 1.5 s"
    assert time.monotonic() - began < 30


def test_all_parts_together_are_under_8_minutes(script: ModuleType) -> None:
    assert sum(limit_s for _, limit_s in script.PARTS.values()) < 8 * 60


def test_what_is_retuned(script: ModuleType) -> None:
    shares = {"linear nf4": 0.69, "values bf16": 0.71}
    records = [{"records": 1, "ratio": 0.84}, {"records": 8, "ratio": 0.86}]
    found = script.retune({"rates": {"share_of_bandwidth": shares}, "fetch": {"records": records}})
    assert len(found) == 2
    assert found[0].startswith("linear nf4 reaches 69%")
    assert found[1].startswith("fetching 1 reaches 84% of copies")
    assert script.retune({"rates": {"failed": "no driver"}}) == []


def test_a_card_of_the_table_has_its_bandwidth(script: ModuleType) -> None:
    assert script.published("NVIDIA GeForce RTX 4090") == 1008
    assert script.published("Voodoo") is None
