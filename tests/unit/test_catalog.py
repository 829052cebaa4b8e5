"""The table of families, held to what the tests really run."""

import json
import re
from pathlib import Path

import pytest
import transformers
from support.checkpoints import FAMILIES
from support.families import decorated_classes
from transformers.models.auto.configuration_auto import model_type_to_module_name

from offload_moe.checkpoint.catalog import REFUSED, Family, families
from offload_moe.families import ADAPTERS
from tests.support.cli import load_cli


@pytest.fixture(scope="module")
def table() -> dict[str, Family]:
    return {family.name: family for family in families()}


def test_whole_model_is_said_of_the_families_whose_whole_model_is_tested(table: dict[str, Family]) -> None:
    """A family that appears in a newer transformers fails here until it has a tiny config in tests/support."""
    tested = {model_type_to_module_name(model_type) for model_type in FAMILIES} - set(REFUSED)
    assert {name for name, family in table.items() if family.verified == "whole model"} == tested
    assert {name for name, family in table.items() if family.verified == "refused"} == set(REFUSED) & set(table)
    assert {name for name, family in table.items() if family.verified == "contract only"} == {"openai_privacy_filter"}


def test_every_decorated_class_and_every_adapter_is_there(table: dict[str, Family]) -> None:
    expected = {name for _, name in decorated_classes()} | {adapter.class_name for adapter in ADAPTERS}
    assert {kind for family in table.values() for kind in family.classes} == expected
    assert {name for name, family in table.items() if family.has_adapter} == {adapter.family for adapter in ADAPTERS}


def test_the_page_counts_the_families_of_the_transformers_that_it_names(table: dict[str, Family]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    named = re.search(r"in transformers (\d+\.\d+) \|", page)
    assert named is not None
    if not transformers.__version__.startswith(f"{named[1]}."):
        pytest.skip(f"the page is about transformers {named[1]}, this is {transformers.__version__}")
    verified = [family.verified for family in table.values()]
    assert f"| {verified.count('whole model')} of {len(verified)} families |" in page
    classes = decorated_classes()
    num_families = len({module for module, _ in classes})
    assert f"{num_families} families ({len(classes)} classes) of transformers {named[1]}" in page


@pytest.mark.parametrize(
    ("family", "special"),
    [
        ("mixtral", []),
        ("qwen2_moe", ["shared experts"]),
        ("deepseek_v3", ["shared experts", "latent attention"]),
        ("gpt_oss", ["biases", "transposed", "gate and up interleaved"]),
        ("nemotron_h", ["recurrent layers", "no gate"]),
        ("muse_spark", ["norm after each expert"]),
        ("switch_transformers", ["encoder-decoder"]),
        ("longcat_flash", ["zero-compute experts"]),
    ],
)
def test_what_is_special(family: str, special: list[str], table: dict[str, Family]) -> None:
    assert set(special) <= set(table[family].special)
    assert special or not table[family].special


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main = load_cli()
    assert main.main(["models"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["FAMILY", "VERIFIED", "EXPERTS", "FAST", "PATH", "SPECIAL"]
    assert any(line.split() == ["dbrx", "whole", "model", "adapter", "not", "declared"] for line in lines)
    assert "families in transformers" in captured.err


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    main = load_cli()
    assert main.main(["models", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    entry = next(family for family in document["families"] if family["name"] == "nllb_moe")
    assert entry["model_types"] == ["nllb-moe"]
    assert entry["runs"]
    assert entry["fast_path"] == "not declared"
    assert entry["has_adapter"]
