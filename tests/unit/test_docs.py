"""The documentation: its reference is what the parsers say, and its examples run."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from tests.support.cli import load_cli

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
    shown = [command for command in commands() if "[" not in command]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
