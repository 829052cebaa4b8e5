"""The documentation: its reference is what the parsers say, and its examples run."""

import io
import re
import runpy
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offload_moe.convert.quantize import quantize
from offload_moe.demo import checkpoint_folder
from offload_moe.engine.load import load
from offload_moe.engine.model import Model
from offload_moe.plan import make_plan
from offload_moe.store import Store
from tests.support.chat import byte_tokenizer, chat_model
from tests.support.cli import load_cli
from tests.support.gguf_models import write_model
from tests.support.plan import CONFIGS

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# A line of shell: what is piped in, and the command up to a comment, a pipe or a file it is written to.
COMMAND = re.compile(
    r"^(?:    |\$ )+(?:printf '(?P<typed>.*)' \| )?(?:\S+ && )?(?:\S*/)?offload-moe "
    r"(?P<command>.+?)(?:\s+#.*|\s[|>]\s.*)?$",
    re.MULTILINE,
)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")


def test_the_reference_is_what_the_parsers_say() -> None:
    load_cli()
    reference = runpy.run_path(str(ROOT / "scripts" / "cli_reference"))["reference"]
    said = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert reference(load_cli().build_parser()) == said, "run scripts/cli_reference"


def test_the_tables_are_what_the_results_say() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "benchmark_tables"))["made"]
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    tables = [page for page in pages if "<!-- table " in page]
    assert len(tables) >= 2
    for page in tables:
        without = re.sub(r"(?<=-->\n)\n\|.*?(?=<!-- end -->)", "", page, flags=re.DOTALL)
        assert len(without) < len(page) - 500
        assert made(without) == page, "run scripts/benchmark_tables"


@dataclass(frozen=True)
class Shown:
    """A command of a page, and what is piped into it."""

    page: str
    command: str
    typed: str

    @property
    def is_usage(self) -> bool:
        return bool(re.search(r"[\[|]|\b[A-Z]{4,}\b|\.\.\.", self.command))

    @property
    def arguments(self) -> list[str]:
        """Of a usage line, all that it names, and the first of each choice."""
        command = re.sub(r"[\[\]]|\.\.\.|\|\S+", " ", self.command) if self.is_usage else self.command
        return shlex.split(command)


SHOWN = [
    Shown(page.name, match["command"], (match["typed"] or "").replace(r"\n", "\n"))
    for page in PAGES
    if page.name != "cli.md"
    for match in COMMAND.finditer(page.read_text(encoding="utf-8"))
]
EXAMPLES_OF_COMMANDS = sorted({(shown.command, shown.typed) for shown in SHOWN if not shown.is_usage})
# Held by tests of their own: tests/integration/test_doctor_self_test.py, for it takes ten seconds, and
# tests/integration/test_serve_docs.py, for a server ends by a signal.
LONG = ("doctor --self-test", "serve")
STORES = ("mixtral-store", "granite-store")
GRANITE = "ibm-granite/granite-3.0-1b-a400m-instruct"


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: f"{shown.page}: {shown.command}")
def test_every_command_that_is_shown_is_understood(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        load_cli().build_parser().parse_args(shown.arguments)
    except SystemExit:
        pytest.fail(f"offload-moe {shown.command}: {capsys.readouterr().err}")


@pytest.fixture
def folder_of_the_reader(small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands of the pages find what they name: small models in place of large ones, the real configs."""
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OFFLOAD_MOE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.chdir(tmp_path)
    for copy in (checkpoint_folder(tmp_path / "cache"), Path("mistralai/Mixtral-8x7B-Instruct-v0.1"), Path(GRANITE)):
        shutil.copytree(small_demo.with_name("model"), copy)
    for store in STORES:
        shutil.copytree(small_demo, store)
    shutil.copy(small_demo.with_name("model.gguf"), "Qwen3-30B-A3B-Q4_K_M.gguf")
    for name in ("Mixtral-8x7B-v0.1", "Qwen3-235B-A22B"):
        shutil.copy(CONFIGS / f"{name}.json", tmp_path)
    Path("deepseek-ai/DeepSeek-V3").mkdir(parents=True)
    shutil.copy(CONFIGS / "DeepSeek-V3.json", "deepseek-ai/DeepSeek-V3/config.json")
    return tmp_path


@pytest.mark.parametrize(("command", "typed"), EXAMPLES_OF_COMMANDS)
def test_every_command_that_is_shown_runs(
    command: str,
    typed: str,
    folder_of_the_reader: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command.startswith(LONG):
        pytest.skip("has a test of its own")
    if command.startswith("quantize"):
        shutil.rmtree(written := shlex.split(command)[2])
    monkeypatch.setattr("offload_moe.doctor.examination.measurements", lambda _: [])
    monkeypatch.setattr("sys.stdin", io.StringIO(typed or "Hello.\n"))
    status = load_cli().main(shlex.split(command))
    streams = capsys.readouterr()
    assert status == ("Does not fit" in streams.out), streams.err
    if command.startswith("quantize"):
        assert Store.open(written).num_experts == 4
    elif not command.startswith("config "):
        assert streams.out.strip()


def test_the_plan_of_the_tutorial_is_what_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    command, *shown = re.search(r"^    \$ offload-moe (plan .*\n(?:    .*\n)+)", page, re.MULTILINE)[1].splitlines()
    load_cli().main(["plan", str(CONFIGS / "granite-3.0-1b-a400m.json"), *command.split()[2:]])
    printed = capsys.readouterr().out
    lines = [line.strip().removeprefix("...") for line in shown]
    assert len(lines) == 5
    assert all(line in printed for line in lines)


def test_every_check_of_the_first_hour_exists() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    page = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
    _, *lines = re.findall(r"^\| .* \| (.*) \|$", page, re.MULTILINE)
    assert len(lines) > 10
    for line in lines:
        named = re.findall(r"`(test_\w+)`", line)
        assert named, line
        for name in named:
            assert f"def {name}(" in tests, name


def test_every_message_of_the_troubleshooting_page_is_said() -> None:
    """Messages in italics; dots stand for what differs."""
    files = [path for folder in ("offload_moe", "cli") for path in (ROOT / folder).rglob("*.py")]
    files.append(ROOT / "build_backend.py")
    # Strings that are continued on the next line are one.
    code = re.sub(r'"\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [message for message in re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", page) if message != "italics"]
    assert len(messages) > 8
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in code, message


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_menu_of_the_site() -> None:
    """`scripts/docs` checks the links; the pages of the root and the decisions come from its hook."""
    menu = [
        name for _, name in re.findall(r"^ +- ([^:]+): (\S+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    ]
    pages = [page.stem for page in PAGES if page.parent.name == "docs"]
    assert sorted(menu) == sorted([*pages, "index", "changelog", "contributing", "security"])


# A file or folder of ours, from the root of the project or of the package; transformers' own are left out.
NAMED = re.compile(r"`((?!transformers/)(?:[a-z_]\w*/)+(?:[\w-]+\.(?:py|c|h))?)`")


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "docs" / "decisions").glob("*.md"))], ids=lambda page: page.name
)
def test_files_that_are_named_exist(page: Path) -> None:
    """The log keeps the names of its days."""
    named = NAMED.findall(page.read_text(encoding="utf-8")) if page.name != "LOG.md" else []
    for path in named:
        assert any((root / path).exists() for root in (ROOT, ROOT / "offload_moe")), f"{page.name}: {path}"


def test_pages_name_files() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert {"engine/load.py", "native/csrc/span.c", "tests/unit/test_architecture.py"} <= set(NAMED.findall(page))


EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(EXAMPLE.findall(page.read_text(encoding="utf-8")))
]


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of what stands in for the demo model; its checkpoint and a GGUF file lie beside it."""
    folder = tmp_path_factory.mktemp("docs") / "model"
    model = chat_model("mixtral", num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=16384)
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    write_model(folder.with_name("gguf"), "qwen3_moe").path.rename(folder.with_name("model.gguf"))
    return quantize(folder, folder.parent / "store")


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_examples_run(
    code: str, small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_small(
        source: str, *options: Any, vram: str | None = None, ram: str | None = None, **settings: Any
    ) -> Model:
        assert source == "demo"
        return load(small_demo, *options, **settings)

    config = CONFIGS / "Mixtral-8x7B-v0.1.json"
    monkeypatch.setattr("offload_moe.load", load_small)
    monkeypatch.setattr("offload_moe.plan.make_plan", lambda model, machine: make_plan(config, machine))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out
