"""Tiny tokenizers of every kind, as files. All of them know "Hello world"."""

import base64
import json
import struct
from pathlib import Path

from tests.support.chat import CHATML, byte_tokenizer

LETTERS = "Helo wrd"


def write_tokenizer(folder: Path, kind: str) -> None:
    """kind: a key of KINDS. `config.json` is written only where there is none."""
    model_type, files = KINDS[kind]
    folder.mkdir(exist_ok=True)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_byte_tokenizer(folder: Path) -> None:
    """`tokenizer.json` alone."""
    (folder / "tokenizer.json").write_text(byte_tokenizer(None).backend_tokenizer.to_str())


def _sentencepiece() -> bytes:
    """A unigram model: the messages of sentencepiece_model.proto that have to be there."""
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    words = [("▁Hello", -1.0, 1), ("▁world", -2.0, 1), ("▁", -3.0, 1)]
    pieces = [*special, *words, *((letter, -4.0 - place, 1) for place, letter in enumerate(LETTERS))]
    encoded = [
        _bytes(1, _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for text, score, kind in pieces
    ]
    return b"".join(encoded) + _bytes(2, _number(3, 1)) + _bytes(3, _bytes(1, b"identity"))


def _bytes(field: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([field << 3 | 2, len(data)]) + data


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3, value])


def _tiktoken() -> bytes:
    ranks = [*(bytes([value]) for value in range(256)), b"He"]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))


def _tekken() -> bytes:
    vocabulary = [
        {"rank": value, "token_bytes": base64.b64encode(bytes([value])).decode(), "token_str": None}
        for value in range(256)
    ]
    config = {"pattern": ".", "num_vocab_tokens": 256, "default_vocab_size": 256, "default_num_special_tokens": 0}
    return json.dumps({"config": config | {"version": "v3"}, "vocab": vocabulary, "special_tokens": []}).encode()


def _config(kind: str, **others: object) -> bytes:
    return json.dumps({"tokenizer_class": kind, **others}).encode()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


BPE = [*LETTERS.replace(" ", "Ġ"), "He"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
REMOTE = {"auto_map": {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]}, "chat_template": CHATML}
Files = dict[str, bytes]
# What transformers reads by itself, what it needs packages for, and what needs code of the checkpoint.
PLAIN: dict[str, tuple[str, Files]] = {
    "byte-pair": (
        "gpt_oss",
        {
            "vocab.json": _json({token: place for place, token in enumerate(BPE)}),
            "merges.txt": b"#version: 0.2\nH e\n",
            "tokenizer_config.json": _config("GPT2Tokenizer"),
        },
    ),
    "word-piece": (
        "bert",
        {"vocab.txt": "\n".join(WORDS).encode(), "tokenizer_config.json": _config("BertTokenizer")},
    ),
    "tekken": ("mixtral", {"tekken.json": _tekken()}),
}
PACKAGED: dict[str, tuple[str, Files]] = {
    "sentencepiece": (
        "mixtral",
        {"tokenizer.model": _sentencepiece(), "tokenizer_config.json": _config("LlamaTokenizer")},
    ),
    "spiece": (
        "switch_transformers",
        {"spiece.model": _sentencepiece(), "tokenizer_config.json": _config("T5Tokenizer")},
    ),
    "tiktoken": (
        "mixtral",
        {"tiktoken.model": _tiktoken(), "tokenizer_config.json": _config("PreTrainedTokenizerFast")},
    ),
}
CODED: dict[str, tuple[str, Files]] = {
    "remote code": ("mixtral", {"tokenizer_config.json": _config("TinyTokenizer", **REMOTE)}),
}
KINDS = PLAIN | PACKAGED | CODED
