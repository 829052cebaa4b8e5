"""The header of a GGUF file: its metadata and the places of its tensors, each count checked against the bytes there.

The file does not say how long its header is. Vocabularies, which only the tokenizer needs, are passed over: they are
most of a header, and reading them took seconds.

Source: ggml, docs/gguf.md, "File Structure"; version 1, with other lengths, is not read.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from offload_moe.errors import CheckpointError

MAGIC = b"GGUF"
BEGINNING = 4 << 20  # of a file: most vocabularies fit
MOST = 128 << 20
MOST_LISTED = 1 << 12  # numbers of an array that are kept: lists of layers are shorter
MOST_DIMENSIONS = 4
AGAIN = "Download it again."
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class Unread:
    """An array of which only the length was read."""

    count: int

    def __repr__(self) -> str:
        return f"an array of {self.count}"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies. shape: the slowest dimension first. kind: ggml's number. start: behind the padding."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a header says. num_bytes: its own, without padding. is_swapped: it is big-endian."""

    metadata: Mapping[str, Any]
    tensors: tuple[TensorPlace, ...]
    num_bytes: int
    is_swapped: bool


def fetch_header(fetch: Callable[[int], bytes], file_bytes: int, what: str) -> tuple[GgufHeader, bytes]:
    """The header of a file, and its bytes. fetch: gives the first so many bytes of the file, or all that it has.

    Raises: CheckpointError naming `what`.
    """
    count = BEGINNING
    while True:
        beginning = fetch(count)
        if (header := parse_header(beginning, what)) is not None:
            return header, beginning[: header.num_bytes]
        if count >= min(file_bytes, MOST):
            raise CheckpointError(
                f"{what} is damaged or cut short: its header does not end in its first {len(beginning)} bytes. {AGAIN}"
            )
        count = min(4 * count, MOST)


def parse_header(beginning: bytes, what: str) -> GgufHeader | None:
    """The header; None where it goes on behind these bytes. Raises: CheckpointError naming `what`."""
    try:
        return _Walk(beginning, what).header()
    except _Beyond:
        return None
    except RecursionError as error:
        raise CheckpointError(f"{what} is damaged: arrays of its metadata are nested without end. {AGAIN}") from error


class _Beyond(Exception):
    """The header goes on behind these bytes."""


class _Walk:
    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._what, self._order, self._at = data, what, "<", 0

    def header(self) -> GgufHeader:
        if self._data[: len(MAGIC)] != MAGIC[: len(self._data)]:
            raise CheckpointError(f"{self._what} is not a GGUF file: it begins with {self._data[:4]!r}.")
        self._pass(len(MAGIC))
        if (version := self._number("I")) > 0xFFFF:  # big-endian
            self._order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise CheckpointError(f"{self._what} is a GGUF file of version {version}; versions 2 and 3 are read.")
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text()
            if key in metadata:
                raise self._damaged(f"its metadata has {key} twice")
            metadata[key] = self._value(self._number("I"))
        tensors = tuple(self._tensor() for _ in range(num_tensors))
        return GgufHeader(metadata, tensors, self._at, self._order == ">")

    def _tensor(self) -> TensorPlace:
        name, num_dimensions = self._text(), self._number("I")
        if not 0 < num_dimensions <= MOST_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {num_dimensions} dimensions, where 1 to {MOST_DIMENSIONS} can be")
        shape = tuple(self._number("Q") for _ in range(num_dimensions))[::-1]
        return TensorPlace(name, shape, self._number("I"), self._number("Q"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        return self._array() if kind == _ARRAY else self._number(self._format(kind))

    def _array(self) -> Any:
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            self._pass_texts(count)
        elif kind == _ARRAY:
            for _ in range(count):
                self._array()
        else:
            numbers = f"{count}{self._format(kind)}"
            place = self._pass(count * struct.calcsize(f"<{self._format(kind)}"))
            if count <= MOST_LISTED:
                return list(struct.unpack_from(self._order + numbers, self._data, place))
        return Unread(count)

    def _format(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise self._damaged(f"its metadata has a value of type {kind}")
        return _FORMATS[kind]

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack_from(self._order + form, self._data, self._pass(struct.calcsize(f"<{form}")))
        return number

    def _text(self) -> str:
        place = self._pass(self._number("Q"))
        return self._data[place : self._at].decode(errors="replace")

    def _pass_texts(self, count: int) -> None:
        length, at, last = struct.Struct(f"{self._order}Q").unpack_from, self._at, len(self._data) - 8
        for _ in range(count):
            if at > last:
                raise _Beyond
            at += 8 + length(self._data, at)[0]
        self._pass(at - self._at)

    def _pass(self, num_bytes: int) -> int:
        """Where these bytes begin; the walk goes on behind them."""
        place = self._at
        self._at += num_bytes
        if self._at > len(self._data):
            raise _Beyond
        return place

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._what} is damaged: {what}. {AGAIN}")
