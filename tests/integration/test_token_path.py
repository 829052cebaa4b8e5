"""The files that a token with a missing expert goes through are those that docs/how-it-works.md lists."""

import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import open_model
from support.tiny_models import tiny_model, tiny_prompt

from offload_moe.convert.quantize import quantize
from offload_moe.engine.model import Model

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "offload_moe"
MOST_LINES = 400


def listed() -> list[str]:
    """Files of the section "A token with a missing expert, file by file"."""
    text = (ROOT / "docs/how-it-works.md").read_text("utf-8")
    section = text.split("## A token with a missing expert, file by file")[1].split("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    return re.findall(r"`([a-z_/]+\.(?:py|c|h))`", rows)


@torch.inference_mode()
def traced(model: Model) -> set[str]:
    """Python files of the package whose functions are called in a decode step, by whichever thread."""
    ids, _ = tiny_prompt(1, 9)
    cache = model.hf(input_ids=ids, use_cache=True).past_key_values
    seen: set[str] = set()

    def note(frame: Any, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            seen.add(path.relative_to(PACKAGE).as_posix())

    for token in range(20):
        before, found = model.stats.copy(), set(seen)
        seen.clear()
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            model.hf(input_ids=torch.tensor([[5 + token]]), past_key_values=cache, use_cache=True)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        if token > 2 and model.stats.since(before).num_misses:
            return seen
        seen |= found
    pytest.fail("no token missed an expert")


def test_a_token_with_a_missing_expert_goes_through_the_listed_files(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    store = quantize(tmp_path / "checkpoint", tmp_path / "store", codec="nf4")
    with open_model(store, 12, prefetch=0) as model:
        found = traced(model)
    assert "decode/span.py" in found
    missing = found - {name for name in listed() if name.endswith(".py")}
    assert not missing, "docs/how-it-works.md does not list them"


def test_the_listed_files_are_short() -> None:
    names = listed()
    assert len(names) == len(set(names))
    for name in names:
        assert len((PACKAGE / name).read_text("utf-8").splitlines()) <= MOST_LINES, name
