"""Text classes of tokens, and prompts from files."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from offload_moe.errors import ConfigError
from offload_moe.profile.prompts import BUILT_IN, GroupedPrompt, read_prompts
from offload_moe.profile.text import CLASSES, class_per_token, classes_of, classify


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" house", "letters"),
        ("n't", "letters"),
        ("дом", "letters"),
        ("7", "number"),
        (" 1,024", "number"),
        (".", "punctuation"),
        ('."', "punctuation"),
        ("(", "punctuation"),
        ("\u2014", "punctuation"),
        ("();", "code"),
        (" ==", "code"),
        ("_name", "code"),
        ("{", "code"),
        ("\n\n", "whitespace"),
        (" ", "whitespace"),
        ("", "special"),
        ("\ufffd", "other"),
        ("x1", "other"),
        ("-", "punctuation"),
    ],
)
def test_classify(text: str, expected: str) -> None:
    assert classify(text) == expected
    assert expected in CLASSES


def test_classes_per_token() -> None:
    texts = {3: "the", 4: " 5", 0: "<s>"}
    tokenizer = SimpleNamespace(all_special_ids=[0], decode=lambda ids: texts[ids[0]])
    classes = classes_of(tokenizer, [4, 3, 4, 0])
    assert classes == {"special": [0], "letters": [3], "number": [4]}
    codes = class_per_token(np.array([4, 3, 0, 99]), classes)
    assert [CLASSES[code] for code in codes] == ["number", "letters", "special", "other"]


def test_our_own_prompts_have_groups() -> None:
    assert {prompt.group for prompt in BUILT_IN} == {"prose", "code", "numbers", "other language"}
    assert len({prompt.text for prompt in BUILT_IN}) == len(BUILT_IN)


def test_lines_and_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('Why?\n\n{"prompt": "Pourquoi ?", "group": "french"}\n{not json}\n{"prompt": "x"}\n')
    assert read_prompts(path) == [
        GroupedPrompt(group="", text="Why?"),
        GroupedPrompt(group="french", text="Pourquoi ?"),
        GroupedPrompt(group="", text="{not json}"),
        GroupedPrompt(group="", text="x"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "is empty"),
        (b'ok\n{"group": "a"}\n', r'line 2 has no "prompt"'),
        (b'{"prompt": 3}\n', r'line 1 has no "prompt"'),
        (b"\xff\xff", "is not UTF-8: byte 0xff"),
    ],
)
def test_prompts_that_cannot_be_run(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / "p")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "absent")
