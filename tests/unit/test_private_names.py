"""Names with an underscore stay in the package: what is outside uses public ones."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Names of the standard library, of torch and of transformers that ours happen to share.
FOREIGN = {
    "_exit",
    "_name",
    "_schema",
    "_replace",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_attn_implementation",
    "_experts_implementation",
}
# Accesses by file. A number may become smaller and no entry may be added: give what a test needs a public name instead.
ALLOWED: dict[str, int] = {
    "fault/test_copies.py": 4,
    "fault/test_copies_page_lock.py": 2,
    "fault/test_copies_slots.py": 1,
    "fault/test_disk_in_token_passes.py": 10,
    "fault/test_disk_reads.py": 1,
    "fault/test_links.py": 2,
    "integration/test_decode_span.py": 3,
    "integration/test_doctor_self_test.py": 1,
    "integration/test_hybrid_balance.py": 1,
    "integration/test_latent_cache.py": 1,
    "integration/test_lifecycle.py": 5,
    "integration/test_lookahead.py": 12,
    "integration/test_profile_record.py": 1,
    "unit/test_demo_source.py": 1,
    "unit/test_first_hour.py": 1,
    "unit/test_lookahead_tiers.py": 4,
    "unit/test_native_abi.py": 1,
    "unit/test_policy_contract.py": 1,
    "unit/test_policy_knn.py": 3,
}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in FOREIGN


def definitions(tree: ast.Module, *, of_self: bool = False) -> Iterator[str]:
    """Names that are defined. of_self: of attributes, those of `self` only."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=owner, attr=name, ctx=ast.Store()):
                if not of_self or (isinstance(owner, ast.Name) and owner.id == "self"):
                    yield name


OURS = {
    name
    for folder in ("offload_moe", "cli")
    for path in (ROOT / folder).rglob("*.py")
    for name in definitions(tree_of(path))
    if is_private(name)
}


def accesses(tree: ast.Module) -> Iterator[str]:
    """Private names of ours that are read of something else than `self`, imported, or named in a call of setattr."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(attr=name) if name in OURS:
                yield name
            case ast.ImportFrom(names=names):
                yield from (alias.name for alias in names if alias.name in OURS)
            case ast.Call(func=ast.Attribute(attr=function) | ast.Name(id=function), args=[*arguments]):
                if function in ("setattr", "getattr", "hasattr", "delattr", "object", "patch"):
                    texts = [a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                    yield from (text for text in texts[:1] if text.rpartition(".")[2] in OURS)


def scripts(folder: str) -> list[Path]:
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in ("", ".py")]
    return [path for path in files if path.suffix or path.read_bytes().startswith(b"#!/usr/bin/env python")]


@pytest.mark.parametrize("folder", ["cli", "benchmarks", "scripts"])
def test_nothing_beside_the_package_uses_its_private_names(folder: str) -> None:
    files = scripts(folder)
    assert files
    for path in files:
        tree = tree_of(path)
        own = set(definitions(tree, of_self=True))
        assert not [name for name in accesses(tree) if name not in own], path.relative_to(ROOT)


def test_tests_use_ever_fewer_private_names() -> None:
    found = Counter[str]()
    for path in scripts("tests"):
        tree = tree_of(path)
        own = set(definitions(tree, of_self=True))
        found[path.relative_to(ROOT / "tests").as_posix()] = sum(name not in own for name in accesses(tree))
    more = {name: count for name, count in found.items() if count > ALLOWED.get(name, 0)}
    assert not more, "use a public name, or give it one"
    assert all(found[name] for name in ALLOWED), "an entry that is not needed any more"


def test_an_access_is_found() -> None:
    source = """
from offload_moe.engine.build import _bind_experts
model._dense_bytes
self._dense_bytes
monkeypatch.setattr(Model, "_dense_bytes", 3)
monkeypatch.setattr("offload_moe.engine.model.Model._dense_bytes", 3)
os._exit(0)
parser._actions
"""
    name = "_dense_bytes"
    assert sorted(accesses(ast.parse(source))) == sorted(
        [name, name, f"offload_moe.engine.model.Model.{name}", "_bind_experts"]
    )
