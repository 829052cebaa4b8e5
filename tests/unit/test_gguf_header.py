"""Headers of GGUF files by strangers: counts without the bytes, and tensors that are not where they could be."""

import os
import struct
import tracemalloc
from pathlib import Path

import pytest

from offload_moe.checkpoint.gguf_file import read_gguf
from offload_moe.checkpoint.gguf_header import MOST_LISTED, Unread
from offload_moe.errors import CheckpointError

HUGE = 2**60
BYTE, NUMBER, STRING, ARRAY = 0, 4, 8, 9


def text(content: str | bytes) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(data)) + data


def value(content: int | str) -> bytes:
    if isinstance(content, str):
        return struct.pack("<I", STRING) + text(content)
    return struct.pack("<II", NUMBER, content)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + content


def tensor(name: str = "a", shape: tuple[int, ...] = (2, 32), kind: int = 0, start: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, start)


def write(
    path: Path, keys: list[bytes], tensors: list[bytes], counts: tuple[int, int] | None = None, num_bytes: int = 4096
) -> Path:
    """A file of so many bytes. keys: each with its value."""
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + b"".join([*keys, *tensors]))
    os.truncate(path, num_bytes)
    return path


def refused(path: Path, match: str) -> None:
    """Within a little memory, too."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match):
            read_gguf([path])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        array(BYTE, HUGE),
        array(10, HUGE),
        array(STRING, HUGE),
        array(ARRAY, HUGE),
        array(ARRAY, HUGE, struct.pack("<IQ", BYTE, 0) * 200),
        struct.pack("<IQ", STRING, 2**64 - 1),
    ],
)
def test_a_value_longer_than_the_file(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", [text("key") + content], [])
    refused(path, r"a\.gguf is damaged( or cut short: its header does not end in its first 4096|: its metadata has)")


@pytest.mark.parametrize("counts", [(HUGE, 0), (0, HUGE), (1, 2**64 - 1)])
def test_more_keys_and_tensors_than_there_are(counts: tuple[int, int], tmp_path: Path) -> None:
    refused(write(tmp_path / "a.gguf", [], [], counts), r"a\.gguf is damaged")


def test_what_is_read_of_arrays_and_texts(tmp_path: Path) -> None:
    keys = [
        text("long") + array(BYTE, MOST_LISTED + 1, bytes(MOST_LISTED + 1)),
        text("short") + array(NUMBER, 3, struct.pack("<3I", 1, 2, 3)),
        text("words") + array(STRING, 2, text("a") + text("b")),
        text("apart") + array(ARRAY, 1, struct.pack("<IQ", BYTE, 2) + b"ab"),
        text("broken") + struct.pack("<I", STRING) + text(b"a\xff"),
    ]
    found = read_gguf([write(tmp_path / "a.gguf", keys, [tensor()], num_bytes=1 << 14)]).metadata
    long, words, apart = Unread(MOST_LISTED + 1), Unread(2), Unread(1)
    assert found == {"long": long, "short": [1, 2, 3], "words": words, "apart": apart, "broken": "a\ufffd"}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ([tensor(start=2**63)], r"tensor a is cut short: it ends at byte 9223372036854\d+, and the file at 4096"),
        ([tensor(shape=(2**40, 32))], "tensor a is cut short"),
        ([tensor(shape=(2**32, 2**32, 2**32, 2**32))], "tensor a is cut short"),
        ([tensor(), tensor("b", start=32)], "tensor b begins within tensor a"),
        ([tensor(), tensor(start=256)], "tensor a is there twice"),
        ([tensor(shape=())], "tensor a has 0 dimensions, where 1 to 4 can be"),
        ([tensor(shape=(1, 1, 1, 1, 32))], "tensor a has 5 dimensions"),
        ([tensor(shape=(0, 32))], r"tensor a in F32 is \[0, 32\], which is empty"),
        ([tensor(shape=(2, 33), kind=8)], r"tensor a in Q8_0 is \[2, 33\], which is empty or has rows .* 32"),
        ([tensor(shape=(64,), kind=8)], "tensor a is a vector in Q8_0; vectors are read in F32, F16, BF16"),
        ([tensor(kind=99)], "tensor a is of type 99, which the gguf package does not have"),
        ([tensor(kind=26)], "tensor a is I32, which cannot be dequantized"),
    ],
)
def test_tensors_that_cannot_be(tensors: list[bytes], match: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.gguf", [], tensors), rf"a\.gguf.*{match}.*(Download it again|Use another)")


@pytest.mark.parametrize("alignment", [0, 3, "32"])
def test_an_alignment_that_cannot_be(alignment: int | str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", [text("general.alignment") + value(alignment)], [tensor()])
    refused(path, rf"general\.alignment is {alignment!r}, not a power of two")


def test_an_alignment_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", [text("general.alignment") + value(1024)], [tensor()])
    assert read_gguf([path]).tensors["a"].offset == 1024


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    refused(write(tmp_path / "a.gguf", [text("k") + value(1)] * 2, []), "its metadata has k twice")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").mkdir()
    refused(tmp_path / "a.gguf", r"a\.gguf is no file")
    refused(tmp_path / "b.gguf", r"b\.gguf is no file")
