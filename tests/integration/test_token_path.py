"""The files that a token with a missing expert goes through are those that docs/how-it-works.md lists."""

import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.c_trace import files_of_tokens
from support.models import open_model
from support.tiny_models import tiny_model, tiny_prompt

from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model
from offload_moe.families.cache_name import cache_from, with_cache

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "offload_moe"
CSRC = "native/csrc/"
MOST_LINES = 400  # no listed file has as many
IF_SLOW = {"memory/waiting.py", "residency/lease.py", "residency/scheduler.py"}  # where a read outlasts its layer
OF_A_SET = ("panel_portable.c", "vector_portable.c")  # the page names them by what they are


def section() -> str:
    text = (ROOT / "docs/how-it-works.md").read_text("utf-8")
    return text.split("## A token with a missing expert, file by file")[1].split("\n## ")[0]


def listed(suffixes: tuple[str, ...] = (".py", ".c", ".h")) -> list[str]:
    """Files of the table there."""
    rows = "\n".join(line for line in section().splitlines() if line.startswith("|"))
    return [name for name in re.findall(r"`([a-z_0-9/]+\.(?:py|c|h))`", rows) if name.endswith(suffixes)]


@torch.inference_mode()
def traced(model: Model) -> tuple[set[str], set[str]]:
    """Python files of the package whose functions are called, by whichever thread: in a token that misses an expert,
    and in any of twenty."""
    ids, _ = tiny_prompt(1, 9)
    cache = cache_from(model.hf(input_ids=ids, use_cache=True))
    seen: set[str] = set()

    def note(frame: Any, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            seen.add(path.relative_to(PACKAGE).as_posix())

    missing, every = set[str](), set[str]()
    for token in range(20):
        before = model.stats.copy()
        seen.clear()
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            model.hf(input_ids=torch.tensor([[5 + token]]), **with_cache(cache), use_cache=True)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        if token > 2 and model.stats.since(before).num_misses and not missing:
            missing |= seen
        every |= seen
    return missing, every


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("path")
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(root / "checkpoint")
    return quantize(root / "checkpoint", root / "store", codec="nf4")


def test_a_token_with_a_missing_expert_goes_through_the_listed_files(store: Path) -> None:
    with open_model(store, 12, prefetch=0) as model:
        missing, every = traced(model)
    assert "decode/span.py" in missing
    names = set(listed((".py",)))
    assert not missing - names, "docs/how-it-works.md does not list them"
    assert not names - every - IF_SLOW, "no token goes through them"


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("gcov")), reason="no gcc with gcov")
def test_and_through_the_listed_c_files(store: Path, tmp_path: Path) -> None:
    found = files_of_tokens(store, tmp_path)
    names = {name.removeprefix(CSRC) for name in listed((".c", ".h"))}
    assert {name for name in found if name.endswith(".c")} - names == set(OF_A_SET)
    assert not names - found, "the token does not go through them"


def test_the_listed_files_are_short_and_counted() -> None:
    names = listed()
    assert len(names) == len(set(names))
    for name in names:
        assert len((PACKAGE / name).read_text("utf-8").splitlines()) < MOST_LINES, name
    counts = len(listed((".py",))), len(listed((".c", ".h"))) + len(OF_A_SET)
    assert f"{counts[0]} Python and {counts[1]} C files" in " ".join(section().split())
