"""Tokenizers of every kind: read, or named with what to do."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from offload_moe import load
from offload_moe.checkpoint import tokenizer as module
from offload_moe.checkpoint.tokenizer import INSTALL, PACKAGES_OF, load_tokenizer, obstacle
from offload_moe.convert.quantize import quantize
from offload_moe.errors import ConfigError
from offload_moe.store import Store
from tests.support.chat import CHATML
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import PACKAGED, PLAIN, write_byte_tokenizer, write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
PACKAGES = {package for packages in PACKAGES_OF.values() for package in packages}


def are_packages_there() -> bool:
    try:
        return all(version(package) for package in PACKAGES)
    except PackageNotFoundError:
        return False


def said(folder: Path) -> str:
    tokenizer, reason = load_tokenizer(folder)
    assert reason == "", reason
    text: str = tokenizer.decode(tokenizer("Hello world")["input_ids"], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("kind", PLAIN)
def test_kinds_that_need_nothing(kind: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, kind)
    assert obstacle(tmp_path) is None
    assert said(tmp_path).lower() == "hello world"


@pytest.mark.skipif(not are_packages_there(), reason=f"needs {', '.join(PACKAGES)}")
@pytest.mark.parametrize("kind", PACKAGED)
def test_kinds_that_need_packages(kind: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, kind)
    assert obstacle(tmp_path) is None
    assert said(tmp_path) == "Hello world"


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_installed", lambda package: package not in PACKAGES)


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize("kind", PACKAGED)
def test_without_the_packages_they_are_named(kind: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, kind)
    assert INSTALL in (obstacle(tmp_path) or "")
    tokenizer, reason = load_tokenizer(tmp_path)
    assert tokenizer is not None or reason == obstacle(tmp_path)  # one that another program needs may be there


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [
        ("tiktoken", {"tiktoken"}, {"sentencepiece", "protobuf"}),
        ("sentencepiece", {"sentencepiece", "protobuf"}, {"tiktoken"}),
    ],
)
def test_only_the_packages_of_its_own_format_are_needed(
    kind: str, own: set[str], others: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer(tmp_path, kind)
    monkeypatch.setattr(module, "is_installed", lambda package: package in own)
    assert obstacle(tmp_path) is None
    monkeypatch.setattr(module, "is_installed", lambda package: package in others)
    assert all(package in (obstacle(tmp_path) or "") for package in own)


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_a_missing_package_is_no_obstacle_beside_a_tokenizer_json(kind: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, kind)
    assert INSTALL in (obstacle(tmp_path) or "")
    write_byte_tokenizer(tmp_path)
    assert obstacle(tmp_path) is None
    assert said(tmp_path) == "Hello world"


def test_remote_code_is_not_run_and_not_needed_beside_a_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenization_tiny.py").write_text("raise SystemExit('code of a checkpoint was run')")
    write_tokenizer(tmp_path, "remote code")
    tokenizer, reason = load_tokenizer(tmp_path)
    assert tokenizer is None
    assert "is never run: put a tokenizer.json" in reason
    write_byte_tokenizer(tmp_path)
    assert said(tmp_path) == "Hello world"
    assert load_tokenizer(tmp_path)[0].chat_template == CHATML


@pytest.mark.parametrize("content", ["{nonsense", '{"model": {"type": "Nope"}}', "[]", ""])
def test_a_damaged_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "tekken")
    (tmp_path / "tekken.json").unlink()
    (tmp_path / "tokenizer.json").write_text(content)
    tokenizer, reason = load_tokenizer(tmp_path)
    assert tokenizer is None
    assert reason.startswith("The tokenizer (tokenizer.json) cannot be read: ")
    assert "\n" not in reason


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "tekken")
    (tmp_path / "tekken.json").unlink()
    assert load_tokenizer(tmp_path) == (
        None,
        "The model has no tokenizer: put a tokenizer.json of this model beside the weights.",
    )


def test_the_conversion_says_it_and_the_model_takes_ids(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    write_tokenizer(tmp_path / "checkpoint", "remote code")
    notices: list[str] = []
    quantize(tmp_path / "checkpoint", tmp_path / "store", codec="bf16", on_notice=notices.append)
    assert any("needs remote code" in notice for notice in notices)
    assert Store.open(tmp_path / "store").has_tokenizer
    with load(tmp_path / "store") as model:
        with pytest.raises(ConfigError, match=r"needs remote code .* model\.hf\.generate takes token ids"):
            model.generate("Hello")
        assert model.hf.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
