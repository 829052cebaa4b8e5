"""Whole models of every family, through `load` from a converted store: eager's bits for a prompt and with the cache."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import FAMILIES, FEW
from support.families import both, prompt_and_decode, spoil_one_record

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes

ADAPTED = ("dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7", "switch_transformers")
APART = ("nllb-moe", "diffusion_gemma")  # see test_adapters.py and test_families_refused.py
DEFAULT = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoehybrid", *ADAPTED)
REST = [family for family in FAMILIES if family not in (*DEFAULT, *APART)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))


def check_whole_model(folder: Path, family: str) -> None:
    with both(folder, family) as (model, oracle):
        expected = prompt_and_decode(oracle)
        assert expected.abs().max() > 1e-3
        assert torch.equal(prompt_and_decode(model.hf), expected)
        spoil_one_record(model)
        assert not torch.equal(prompt_and_decode(model.hf), expected)


@pytest.mark.parametrize("family", DEFAULT)
def test_a_whole_model_gives_the_bits_of_eager(family: str, tmp_path: Path) -> None:
    check_whole_model(tmp_path, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", REST)
def test_every_other_family(family: str, tmp_path: Path) -> None:
    check_whole_model(tmp_path, family)


def test_the_few_of_the_conversion_are_among_them() -> None:
    assert set(FEW) <= {*DEFAULT, *REST}
