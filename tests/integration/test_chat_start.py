"""`benchmarks/chat_start.py` over a tiny model."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.cli import ROOT, environment

pytest.importorskip("pty", reason="needs a POSIX terminal")

START = """
import importlib, sys
sys.argv[0] = "offload-moe"
from tests.support.cli import fake_load_module, load_cli
main = load_cli()
importlib.import_module("offload_moe_cli.loading").check_model = lambda *_: None
sys.modules["offload_moe.engine.load"] = fake_load_module()
sys.exit(main.main())
"""


def test_the_phases_of_a_start_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    benchmark = import_module("chat_start")
    monkeypatch.setattr(benchmark, "START", START)
    monkeypatch.setattr(benchmark, "IMPORT", "import json.tool")
    monkeypatch.setattr(benchmark, "NUM_WARMUPS", 0)
    benchmark.main(["thinker", "--trials", "1"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    phases = {name: seconds["median"] for name, seconds in document["phases_s"].items()}
    assert list(phases) == ["interpreter and arguments", "line editor", "prompt", "model", "in all"]
    assert all(seconds > 0 for seconds in phases.values())
    assert phases["in all"] == pytest.approx(sum(phases.values()) - phases["in all"])
    assert document["imports_s"]["json"] > 0
