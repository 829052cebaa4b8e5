"""The choice of one model in GGUF among the files of a hub repository."""

import pytest

from offload_moe.checkpoint.gguf_hub import choose_files
from offload_moe.errors import CheckpointError
from offload_moe.system.names import split_gguf_name

FILES = [
    *("README.md", "mmproj-F16.gguf", "tiny-Q4_K_M.gguf", "tiny-Q4_K_S.gguf", "tiny-Q8_0.gguf"),
    *(f"UD-Q2_K_XL/tiny-UD-Q2_K_XL-{number:05}-of-00003.gguf" for number in (3, 1, 2)),
    "tiny-UD-Q4_K_M.gguf.part",
]


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        ("Q4_K_M", ["tiny-Q4_K_M.gguf"]),
        ("q8_0", ["tiny-Q8_0.gguf"]),
        ("UD-Q2_K_XL", [f"UD-Q2_K_XL/tiny-UD-Q2_K_XL-{number:05}-of-00003.gguf" for number in (1, 2, 3)]),
        ("*Q4_K_S*", ["tiny-Q4_K_S.gguf"]),
        ("UD-*", [f"UD-Q2_K_XL/tiny-UD-Q2_K_XL-{number:05}-of-00003.gguf" for number in (1, 2, 3)]),
    ],
)
def test_the_model_that_is_meant(wanted: str, files: list[str]) -> None:
    assert choose_files(FILES, wanted, "org/tiny-GGUF") == files


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ("Q4_K", r"no model in GGUF named Q4_K: UD-Q2_K_XL/.*, tiny-Q4_K_M\.gguf, .*\. Write a part of one name"),
        ("tiny-*", r"4 models in GGUF that tiny-\* could mean"),
        ("F16", "no model in GGUF named F16"),
    ],
)
def test_none_or_several(wanted: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        choose_files(FILES, wanted, "org/tiny-GGUF")


def test_names() -> None:
    assert split_gguf_name("org/tiny-GGUF:Q4_K_M") == ("org/tiny-GGUF", "Q4_K_M")
    assert split_gguf_name("org/tiny-GGUF:*Q4_K_M*.gguf") == ("org/tiny-GGUF", "*Q4_K_M*.gguf")
    for other in ("org/tiny-GGUF", "tiny:Q4", "https://hf.co/org/tiny", "org/tiny:", "C:/models/tiny", "../a:b"):
        assert split_gguf_name(other) is None
