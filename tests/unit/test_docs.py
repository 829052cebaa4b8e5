"""The documentation: its reference is what the parsers say, and its examples run."""

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from offload_moe.model import Model, load
from offload_moe.plan import make_plan
from offload_moe.quantize import quantize
from tests.support.chat import byte_tokenizer, chat_model
from tests.support.cli import load_cli
from tests.support.plan import CONFIGS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(?:    |\$ )+(?:\S+ && )?(?:\S*/)?offload-moe (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")


def test_the_reference_is_what_the_parsers_say() -> None:
    load_cli()
    reference = runpy.run_path(str(ROOT / "scripts" / "cli_reference"))["reference"]
    said = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert reference(load_cli().build_parser()) == said, "run scripts/cli_reference"


def commands() -> list[str]:
    return [match for page in PAGES if page.name != "cli.md" for match in COMMAND.findall(page.read_text())]


def test_every_command_that_is_shown_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [command for command in commands() if "[" not in command and "..." not in command]
    assert len(shown) > 10
    parser = load_cli().build_parser()
    for command in shown:
        arguments = shlex.split(re.split(r"\s+#|\s[|>]\s", command)[0])
        if arguments == ["--help"]:
            continue
        try:
            parser.parse_args(arguments)
        except SystemExit:
            pytest.fail(f"offload-moe {command}: {capsys.readouterr().err}")


def test_every_check_of_the_first_hour_exists() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    page = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)` \|$", page, re.MULTILINE)
    assert len(named) == page.count("\n| ") - 1  # all lines but the head
    for name in named:
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(EXAMPLE.findall(page.read_text(encoding="utf-8")))
]


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands in for the demo model, which takes minutes to build."""
    folder = tmp_path_factory.mktemp("docs") / "model"
    model = chat_model("mixtral", num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=4096)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return quantize(folder, folder.parent / "store")


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_examples_run(
    code: str, small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_small(source: str, *, vram: str | None = None, ram: str | None = None, **settings: Any) -> Model:
        assert source == "demo"
        return load(small_demo, **settings)

    config = CONFIGS / "Mixtral-8x7B-v0.1.json"
    monkeypatch.setattr("offload_moe.load", load_small)
    monkeypatch.setattr("offload_moe.plan.make_plan", lambda model, machine: make_plan(config, machine))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out
