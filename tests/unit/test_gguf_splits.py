"""Rules by which a GGUF file's tokenizer splits texts, of those that transformers does not have."""

from pathlib import Path

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

from offload_moe.checkpoint.gguf_file import read_gguf
from offload_moe.checkpoint.gguf_splits import SAME, SPLITS
from offload_moe.checkpoint.gguf_tokenizer import write_tokenizer
from tests.support.gguf_vocabulary import TEXT, metadata_of

TOKENS = 400
PIECES = {
    "deepseek-llm": ["ab", "12345", " cdx", ",", "\n", "\n", "  ", " e"],
    "deepseek-coder": ["ab", "1", "2", "3", "4", "5", " cdx", ",", "\n", "\n", "  ", " e"],
    "deepseek-v3": ["ab", "123", "45", " cdx", ",\n\n", "  ", " e"],
    "refact": ["ab", "1", "2", "3", "4", "5", " cdx", ",", "\n\n  ", " e"],
    "kimi-k2": ["ab", "123", "45", " cdx", ",\n\n", "  ", " e"],
    "glm4": ["ab", "123", "45", " cdx", ",\n\n", "  ", " e"],
    "exaone-moe": ["ab", "1", "2", "3", "4", "5", " cdx", ",\n", "\n", "  ", " e"],
    "afmoe": ["ab", "12", "345", " cdx", ",\n\n", "  ", " e"],
    "solar-open": ["ab", "1", "2", "3", "4", "5", " cdx", ",\n\n", "  ", " e"],
    "hunyuan": ["ab", "1", "2", "3", "4", "5", " cdx", ",\n\n", "  ", " e"],
}
SAMPLE = "ab12345 cdx,\n\n   e"


def tokenizer_of(rule: str, folder: Path) -> PreTrainedTokenizerFast:
    writer = gguf.GGUFWriter(folder / "model.gguf", "deepseek2")
    for key, value in metadata_of(rule, TOKENS).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (folder / "tokenizer").mkdir()
    path = folder / "model.gguf"
    write_tokenizer(path, read_gguf([path]).metadata, folder / "tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


@pytest.mark.parametrize("rule", PIECES)
def test_pieces(rule: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(rule, tmp_path)
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(SAMPLE)
    assert [SAMPLE[start:stop] for _, (start, stop) in found] == PIECES[rule]
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT


def test_every_rule_is_here() -> None:
    assert {*SAME, *SPLITS} - {*PIECES} == {"chatglm-bpe", "starcoder"}  # other names of glm4 and refact
    assert SAME["chatglm-bpe"] == SAME["glm4"]
    assert SPLITS["starcoder"] == SPLITS["refact"]
