"""The style of comments, docstrings, messages and documents."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import offload_moe
from offload_moe import errors

ROOT = Path(__file__).parents[2]
ROOMS = [
    "cli",
    *(
        f"offload_moe/{room}"
        for room in (
            "system",
            "checkpoint",
            "quant",
            "convert",
            "store",
            "plan",
            "simulate",
            "profile",
            "serve",
            "doctor",
            "demo",
            "decode",
            "families",
            "experts",
            "engine",
            "chat",
            "native",
            "memory",
            "residency",
            "speculate",
        )
    ),
]
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
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
CODE_SPAN = re.compile(r"```.*?```|`[^`]*`|\{[^}]*\}|\([^()\s]*\.md[^()\s]*\)", re.DOTALL)
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}
PARAMETER = re.compile(r"[a-z_, ]+: ")


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Line numbers with the text of comments and strings."""
    strings = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.COMMENT)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in strings:
            yield token.start[0], token.string


def banned(text: str) -> list[str]:
    return BANNED.findall(CODE_SPAN.sub("", text))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_have_no_banned_word(path: Path) -> None:
    found = [(line, words) for line, text in prose(path.read_text("utf-8")) if (words := banned(text))]
    assert not found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_have_no_banned_word(path: Path) -> None:
    assert not banned(path.read_text("utf-8"))


def test_banned_words_are_found() -> None:
    source = 'x = "a slot is lent"  # whoever\ny = f"{told} it Hears"\n"""`ride` of a\npatience."""\n'
    assert [banned(text) for _, text in prose(source) if banned(text)] == [["whoever"], ["Hears"], ["patience"]]


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


LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "offload_moe")]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_docstrings_have_purpose_and_errors(path: Path) -> None:
    assert not faults(path.read_text("utf-8"))


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
