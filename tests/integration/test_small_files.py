"""What lies beside the weights and is damaged or does not fit: found before the conversion, not after it."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from offload_moe import load
from offload_moe.chat.prompt import stream_tokens
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.store import is_store
from tests.support.chat import byte_tokenizer, chat_model
from tests.support.reference import converted, edit_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # the notices, which are asserted by themselves
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    chat_model("qwen3_moe", **EXPERTS).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_a_sound_folder_gives_no_notice(model: Path, tmp_path: Path) -> None:
    assert converted(model, tmp_path / "store") == []
    with load(tmp_path / "store", context=64) as loaded:
        assert loaded.notices == []


@pytest.mark.parametrize("content", [b"", b"{", b"<html>", b"\xff\xfe"])
def test_generation_settings_that_are_no_json_are_left_out_as_transformers_does(
    model: Path, tmp_path: Path, content: bytes
) -> None:
    (model / "generation_config.json").write_bytes(content)
    edit_config(model, temperature=0.25, do_sample=True)
    (notice,) = converted(model, tmp_path / "store")
    assert "generation_config.json cannot be used" in notice
    expected = AutoModelForCausalLM.from_pretrained(model).generation_config.to_dict()
    assert expected["temperature"] == 0.25
    with load(tmp_path / "store", context=64) as loaded:
        assert loaded.hf.generation_config.to_dict() == expected
        assert loaded.notices == []


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        '"x"',
        '{"max_new_tokens": -5}',
        '{"do_sample": true, "temperature": "warm"}',
        '{"do_sample": true, "top_k": -5}',
        '{"repetition_penalty": 0}',
        '{"eos_token_id": ["</s>"]}',
        '{"bad_words_ids": 5}',
    ],
)
def test_generation_settings_that_mean_nothing_are_left_out(model: Path, tmp_path: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)
    (notice,) = converted(model, tmp_path / "store")
    assert "generation_config.json cannot be used" in notice
    with load(tmp_path / "store", context=64) as loaded:
        assert len(loaded.generate("hi", max_new_tokens=3, temperature=0)) > 0


def test_a_store_that_holds_such_settings_loads_with_a_notice(model: Path, tmp_path: Path) -> None:
    """As those of earlier versions may."""
    converted(model, tmp_path / "store")
    settings = tmp_path / "store" / "generation_config.json"
    settings.write_bytes(bytes(settings.stat().st_size))
    with load(tmp_path / "store", context=64) as loaded:
        assert "generation_config.json cannot be used" in loaded.notices[0]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"model": '])
def test_a_damaged_file_of_the_tokenizer_is_found_first(model: Path, tmp_path: Path, name: str, content: str) -> None:
    (model / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: it .*Download it again, or delete it"):
        converted(model, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages | }}"])
def test_a_template_that_does_not_compile_is_found_first(model: Path, tmp_path: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    (notice,) = converted(model, tmp_path / "store")
    assert "chat template cannot be used" in notice
    with load(tmp_path / "store", context=64) as loaded:
        assert loaded.notices == [notice]
        assert len(loaded.generate("hi", raw=True, max_new_tokens=3, temperature=0)) > 0


def test_a_small_file_that_cannot_be_read_is_found_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "tokenizer.json":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: Permission denied"):
        converted(model, tmp_path / "store")
    assert not is_store(tmp_path / "store")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose embedding lacks the special tokens that its tokenizer has."""
    folder = tmp_path_factory.mktemp("narrow")
    chat_model("qwen3_moe", vocab_size=256, eos_token_id=0, **EXPERTS).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (notice,) = converted(folder / "model", folder / "store")
    assert notice.startswith("The tokenizer has 8 tokens beyond the 256 rows of the model's embedding, such as ")
    return folder / "store"


def test_a_text_with_a_token_beyond_the_embedding_is_refused(narrow: Path) -> None:
    with load(narrow, context=64) as model:
        assert len(model.notices) == 1
        with pytest.raises(
            ConfigError, match=r"token '<\|im_start\|>' \(257\), but .* has 256 rows, for tokens 0 to 255"
        ):
            model.generate("hi", max_new_tokens=2, temperature=0)
        with pytest.raises(ConfigError, match=r"token '\[THINK\]' \(263\)"):
            list(model.stream("a [THINK] b", raw=True, max_new_tokens=2, temperature=0))
        session = model.chat()
        with pytest.raises(ConfigError, match=r"256 rows"):
            list(session.send("hi", max_new_tokens=2))
        assert len(model.generate("hi", raw=True, max_new_tokens=2, temperature=0)) > 0


@pytest.mark.parametrize("wrong", [256, 10**6, -1])
def test_ids_that_are_no_row_are_refused(narrow: Path, wrong: int) -> None:
    ids = torch.tensor([[5, wrong, 7]])
    with load(narrow, context=64) as model:
        for call in (
            lambda: model.hf(input_ids=ids),
            lambda: model.hf.generate(ids, max_new_tokens=2),
            lambda: stream_tokens(model.hf, None, ids, max_new_tokens=2),
        ):
            with pytest.raises(ConfigError, match=rf"token \({wrong}\), but the model's embedding has 256 rows"):
                call()
        with torch.no_grad():
            assert model.hf(input_ids=ids.clamp(0, 255)).logits.std() > 0
