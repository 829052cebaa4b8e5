"""Safetensors headers: what the library writes is read, what lies is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from offload_moe.checkpoint.header import read_header
from offload_moe.errors import CheckpointError


def write(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "b": torch.tensor(7),
        "c": torch.zeros(0, 4),
        "d": torch.ones(3, dtype=torch.bool),
        "e": torch.ones(2, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    entries = read_header(path)
    assert set(entries) == set(tensors)
    content = path.read_bytes()
    for name, tensor in tensors.items():
        found = entries[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tuple(tensor.shape))
        data = content[found.offset : found.offset + found.num_bytes]
        assert data == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_a_padded_header_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": entry(0, 8)}).encode().ljust(4088)
    assert read_header(write(tmp_path / "x", header, bytes(8)))["a"].offset == 4096


@pytest.mark.parametrize(
    ("header", "num_bytes", "match"),
    [
        ({"a": entry(0, 8)}, 7, "truncated inside tensor a"),
        ({"a": entry(0, 8)}, 9, "has 1 bytes after its last tensor"),
        ({"a": entry(4, 12)}, 12, "a gap or an overlap before tensor a"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "a gap or an overlap before tensor b"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "a gap or an overlap before tensor b"),
        ({"a": entry(0, 4)}, 4, "8 bytes, but has 4 in the file"),
        ({"a": entry(0, 8, dtype="F4")}, 8, "dtype F4, which this version cannot read"),
        ({"a": entry(0, 8, shape=[-2])}, 8, "entry of tensor a is malformed"),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "entry of tensor a is malformed"),
        ({"a": entry(0, 8, shape=None)}, 8, "entry of tensor a is malformed"),
        ({"a": entry(8, 0)}, 8, "bytes, but has"),
        ({"a": entry(False, 8)}, 8, "entry of tensor a is malformed"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "tensor a"),
        ({"a": {"dtype": "F32"}}, 8, "entry of tensor a is malformed"),
        ({"a": []}, 8, "entry of tensor a is malformed"),
        ([], 0, "not a JSON object"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, num_bytes: int, match: str) -> None:
    path = write(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(num_bytes))
    with pytest.raises(CheckpointError, match=match):
        read_header(path)


def test_a_name_that_occurs_twice(tmp_path: Path) -> None:
    text = json.dumps(entry(0, 8))
    path = write(tmp_path / "x", f'{{"a": {text}, "a": {text}}}'.encode(), bytes(8))
    with pytest.raises(CheckpointError, match="occurs twice"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\1", bytes(8), b"\xff" * 8, b"\5\0\0\0\0\0\0\0{}", b"PK" * 40])
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=str(tmp_path / "x")):
        read_header(tmp_path / "x")


def test_deep_nesting_does_not_crash(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="malformed header"):
        read_header(write(tmp_path / "x", b"[" * 200_000))


numbers = st.one_of(st.integers(-4, 40), st.integers(), st.none(), st.booleans(), st.text(max_size=2))
entries_strategy = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "", 7, None, []]),
        "shape": st.one_of(st.lists(numbers, max_size=3), numbers),
        "data_offsets": st.one_of(st.tuples(numbers, numbers), st.lists(numbers, max_size=3), numbers),
    },
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), st.one_of(entries_strategy, numbers), max_size=3), data=st.binary())
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "fuzzed", json.dumps(header).encode(), data)
    try:
        found = read_header(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    assert all(e.offset >= 8 and e.offset + e.num_bytes <= size for e in found.values())
