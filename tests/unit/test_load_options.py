"""`LoadOptions`: one check, before anything is read."""

import inspect
import typing
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_moe import LoadOptions, load
from offload_moe.engine.options import LoadKeywords
from offload_moe.errors import ConfigError


def test_the_keywords_are_the_fields() -> None:
    assert typing.get_type_hints(LoadKeywords) == typing.get_type_hints(LoadOptions)
    assert [field.name for field in fields(LoadOptions)] == list(LoadKeywords.__annotations__)
    assert list(inspect.signature(load).parameters) == ["source", "options", "progress", "keywords"]


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"vram": "10"}, "Did you mean 10GiB"),
    ({"ram": -1}, "must lie between 0 and 1024TiB"),
    ({"ram": True}, "Cannot read True as a size"),
    ({"context": 0}, "A context of 0 tokens"),
    ({"context": 2.5}, "A context of 2.5 tokens"),
    ({"codec": "q4_k"}, "Unknown codec 'q4_k'"),
    ({"dense_codec": "mxfp4"}, "mxfp4 is a format of experts"),
    ({"policy": "lfru"}, "There is no policy 'lfru'. Did you mean lru"),
    ({"policy": 3}, "There is no policy 3"),
    ({"hybrid": True}, "There is no hybrid mode True"),
    ({"hybrid": "auto "}, "Did you mean auto"),
    ({"dtype": "fp8"}, "There is no dtype 'fp8'"),
    ({"dtype": torch.int8}, "torch.int8"),
    ({"prefetch": -1}, "A prefetch of -1 layers"),
    ({"prefetch": "2"}, "A prefetch of '2' layers"),
    ({"vrm": "1GiB"}, "There is no option 'vrm'. Did you mean vram"),
    ({"fastpath": False}, "Did you mean fast_path"),
]


@pytest.mark.parametrize(("keywords", "message"), UNUSABLE, ids=lambda value: str(value)[:30])
def test_what_cannot_be_used_is_an_error_before_anything_is_read(
    keywords: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "nothing here", **keywords)


def test_options_that_are_no_options_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="options is dict, not LoadOptions"):
        load(tmp_path, {"ram": "1GiB"})  # type: ignore[arg-type]


def test_keywords_replace_options_and_sizes_become_bytes() -> None:
    options = LoadOptions(ram="1GiB", vram=0, context=512)
    changed = options.updated({"ram": 3 << 20, "policy": "lru"})
    assert (changed.ram_bytes, changed.vram_bytes, changed.context, changed.policy) == (3 << 20, 0, 512, "lru")
    assert (options.ram_bytes, options.policy) == (1 << 30, LoadOptions().policy)
    assert LoadOptions().vram_bytes is None


def test_options_are_frozen_and_do_not_show_the_token() -> None:
    options = LoadOptions(token="hf_secret")
    assert "hf_secret" not in repr(options)
    with pytest.raises(FrozenInstanceError):
        options.context = 5  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "bf16", None])
def test_what_can_be_computed_in_is_taken(dtype: torch.dtype | str | None) -> None:
    assert LoadOptions(dtype=dtype).dtype == dtype
