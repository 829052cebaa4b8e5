"""The style of comments, docstrings, messages and documents."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import offload_moe
from offload_moe import errors
from tests.unit.test_architecture import FLOW

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "offload_moe"
BUILD = [ROOT / "build_backend.py", ROOT / "setup.py"]
SOURCES = {
    "cli": sorted((ROOT / "cli").rglob("*.py")),
    "package": [*sorted(PACKAGE.glob("*.py")), *BUILD],
    **{room: sorted((PACKAGE / room).rglob("*.py")) for room in FLOW},
}
C_SOURCES = [path for path in sorted(PACKAGE.rglob("*")) if path.suffix in (".c", ".h", ".cu", ".cuh")]
# docs/LOG.md is a record of its time; docs/cli.md is made from the sources.
DOCUMENTS = [
    path
    for folder in ("docs", "docs/decisions")
    for path in sorted((ROOT / folder).glob("*.md"))
    if path.name not in ("LOG.md", "cli.md")
] + [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
# A program is no person, and names that were replaced must not return.
BANNED = re.compile(
    r"\b(hears?|heard|told|whoever|nobody|somebody|himself|patience|onlookers?|rides?|lean|wants?|wanted|foretells?|"
    r"foretold|by itself|at hand|for good|asks?|asking|tells?|telling|knows|remembers?|forgets?)\b",
    re.IGNORECASE,
)
C_PROSE = re.compile(r"""'(?:\\.|[^'\\])'|"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/""", re.DOTALL)
CODE_SPAN = re.compile(r"```.*?```|`[^`]*`|\{[^}]*\}|\([^()\s]*\.md[^()\s]*\)", re.DOTALL)
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}
PARAMETER = re.compile(r"[a-z_, ]+: ")


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Line numbers with the text of comments and strings."""
    strings = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.COMMENT)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in strings:
            yield token.start[0], token.string


def c_prose(source: str) -> Iterator[tuple[int, str]]:
    """The same of C."""
    for token in C_PROSE.finditer(source):
        if not token[0].startswith("'"):
            yield source.count("\n", 0, token.start()) + 1, token[0]


def banned(text: str) -> list[str]:
    return BANNED.findall(CODE_SPAN.sub("", text))


def found(path: Path, prose_of: Callable[[str], Iterator[tuple[int, str]]] = prose) -> list[str]:
    """Places of banned words in a source."""
    lines = prose_of(path.read_text("utf-8"))
    return [f"{path.relative_to(ROOT)}:{line}: {words}" for line, text in lines if (words := banned(text))]


@pytest.mark.parametrize("room", SOURCES)
def test_sources_have_no_banned_word(room: str) -> None:
    assert len(SOURCES[room]) > 1
    assert not [place for path in SOURCES[room] for place in found(path)]


def test_c_sources_have_no_banned_word() -> None:
    assert len(C_SOURCES) > 100
    assert not [place for path in C_SOURCES for place in found(path, c_prose)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_have_no_banned_word(path: Path) -> None:
    assert not banned(path.read_text("utf-8"))


def test_banned_words_are_found() -> None:
    source = 'x = "a slot is lent"  # whoever\ny = f"{told} it Hears"\n"""`ride` of a\npatience."""\n'
    assert [banned(text) for _, text in prose(source) if banned(text)] == [["whoever"], ["Hears"], ["patience"]]
    in_c = 'int told = \'"\'; /* it\nknows */ say("tells \\" it"); // of whoever\n#define WANTS'
    assert [(line, banned(text)) for line, text in c_prose(in_c)] == [(1, ["knows"]), (2, ["tells"]), (2, ["whoever"])]


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes, with the methods and constructors of the latter."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (node.name == "__init__" or node.name[0] != "_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


def raised(function: ast.AST) -> set[str]:
    """Names of this package's errors that a function raises itself, without nested functions."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found |= {node.exc.func.id} & ERRORS
        found |= raised(node)
    return found


def faults(source: str) -> list[str]:
    found = []
    for node in public(ast.parse(source).body):
        text = ast.get_docstring(node) or ""
        if isinstance(node, ast.FunctionDef) and raised(node) and "Raises:" not in text:
            found.append(f"{node.name} has no Raises:")
        if text.startswith("Raises:") or (PARAMETER.match(text) and node.name != "__init__"):
            found.append(f"{node.name} does not begin with its purpose")
    return found


@pytest.mark.parametrize("room", SOURCES.keys() - {"cli"})
def test_public_docstrings_have_purpose_and_errors(room: str) -> None:
    wrong = [(path, faults(path.read_text("utf-8"))) for path in SOURCES[room]]
    assert not [(path.relative_to(ROOT), each) for path, each in wrong if each]


def test_faults_are_found() -> None:
    source = '''
def bare(): raise StoreError("")
def named():
    """Open. Raises: StoreError."""
    raise StoreError("")
def nested():
    """Purpose."""
    def _inner(): raise StoreError("")
class Public:
    def method(self):
        """Raises: ConfigError."""
        if self: raise ConfigError("")
    def _private(self): raise ConfigError("")
class Fields:
    """path: a folder."""
'''
    assert faults(source) == [
        "bare has no Raises:",
        "method does not begin with its purpose",
        "Fields does not begin with its purpose",
    ]


def test_exports_have_docstrings() -> None:
    for name in set(offload_moe.__all__) - {"__version__"}:
        assert getattr(offload_moe, name).__doc__, name
    for name in ("load", "quantize"):
        assert "Raises:" in getattr(offload_moe, name).__doc__, name
