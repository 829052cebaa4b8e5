"""Text from outside: encodings, byte order marks, and what is no text."""

from pathlib import Path

import pytest

from offload_moe.errors import ConfigError
from offload_moe.system import texts
from offload_moe.system.texts import check_text, decode, read_text, unescape


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_decides_and_is_removed(encoding: str) -> None:
    assert decode("naïve 🙂\r\nΩ\r".encode(encoding), "it") == "naïve 🙂\nΩ\n"


def test_big_endian_marks() -> None:
    assert decode(b"\xfe\xff" + "Ωa".encode("utf-16-be"), "it") == "Ωa"
    assert decode(b"\x00\x00\xfe\xff" + "Ωa".encode("utf-32-be"), "it") == "Ωa"


@pytest.mark.parametrize(
    ("data", "encoding", "message"),
    [
        ("Grüße".encode("latin-1"), "utf-8", r"notes is not UTF-8: byte 0xfc at offset 2 .*iconv"),
        (b"ok\x81", "cp1252", "notes is not CP1252: byte 0x81 at offset 2"),
        (b"\xff\xfea\x00b", "utf-8", "notes is not UTF-16-LE: byte 0x62 at offset 2"),
    ],
)
def test_other_bytes_are_named(data: bytes, encoding: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(data, "notes", encoding)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("żółw".encode("utf-16"))
    assert read_text(tmp_path / "a") == "żółw"
    with pytest.raises(ConfigError, match="absent cannot be read: No such file"):
        read_text(tmp_path / "absent")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\udce9", r"It has byte 0xe9, which is not UTF-8, at offset 2"),
        ("\ud83d!", r"It has the lone surrogate U\+D83D"),
        (b"bytes", "It is bytes, not text"),
        (None, "It is NoneType, not text"),
    ],
)
def test_what_is_no_text(text: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_text(text, "It")
    check_text("ordinary 🙂", "It")


def test_escaped_bytes_are_decoded_where_they_are_utf8() -> None:
    escaped = "größer".encode().decode("ascii", "surrogateescape")
    assert unescape(escaped, "It", "ascii") == "größer"
    assert unescape("größer", "It", "ascii") == "größer"
    with pytest.raises(ConfigError, match="It is not UTF-8: byte 0xf6 at offset 2"):
        unescape("größer".encode("latin-1").decode("utf-8", "surrogateescape"), "It", "utf-8")
    with pytest.raises(ConfigError, match=r"byte 0xf6, which is not UTF-8, at offset 1"):
        unescape("ü\udcf6", "It", "ascii")


def test_what_never_ends_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MOST_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match="/dev/zero is longer than 1 MiB"):
        read_text(Path("/dev/zero"))
    (tmp_path / "just").write_bytes(b"a" * (1 << 20))
    assert len(read_text(tmp_path / "just")) == 1 << 20
    (tmp_path / "beyond").write_bytes(b"a" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="beyond is longer than 1 MiB"):
        read_text(tmp_path / "beyond")
