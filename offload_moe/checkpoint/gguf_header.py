"""Where the header of a GGUF file ends: metadata and places of tensors, whose length the file does not say.

Source: ggml, docs/gguf.md, "File Structure"; version 1, with other lengths, is not read.
"""

import struct

from offload_moe.errors import CheckpointError

MAGIC = b"GGUF"
BEGINNING = 4 << 20  # of a file: most vocabularies fit
MOST = 512 << 20
_STRING, _ARRAY = 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type


class _Beyond(Exception):
    """The header goes on behind these bytes."""


def header_end(beginning: bytes, what: str) -> int | None:
    """Where the header ends; None where it goes on behind these bytes. Raises: CheckpointError naming `what`."""
    walk = _Walk(beginning, what)
    try:
        walk.header()
    except _Beyond:
        return None
    except RecursionError as error:
        raise CheckpointError(f"{what} is damaged: arrays of its metadata are nested without end.") from error
    return walk.at


class _Walk:
    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._what, self._order = data, what, "<"
        self.at = 0

    def header(self) -> None:
        self._skip(len(MAGIC))
        if self._data[: len(MAGIC)] != MAGIC:
            raise CheckpointError(f"{self._what} is not a GGUF file: it begins with {self._data[:4]!r}.")
        if (version := self._number("I")) > 0xFFFF:  # big-endian
            self._order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise CheckpointError(f"{self._what} is a GGUF file of version {version}; versions 2 and 3 are read.")
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        for _ in range(num_keys):
            self._string()
            self._value(self._number("I"))
        for _ in range(num_tensors):
            self._string()
            self._skip(8 * self._number("I") + 12)  # lengths, type and place

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._skip(self._width(kind))
        kind, count = self._number("I"), self._number("Q")
        if kind not in (_STRING, _ARRAY):
            return self._skip(self._width(kind) * count)
        for _ in range(count):
            self._value(kind)
        return None

    def _string(self) -> None:
        self._skip(self._number("Q"))

    def _width(self, kind: int) -> int:
        if kind not in _WIDTHS:
            raise CheckpointError(f"{self._what} is damaged: its metadata has a value of type {kind}.")
        return _WIDTHS[kind]

    def _number(self, kind: str) -> int:
        place = self.at
        self._skip(struct.calcsize(kind))
        return int(struct.unpack_from(self._order + kind, self._data, place)[0])

    def _skip(self, num_bytes: int) -> None:
        self.at += num_bytes
        if self.at > len(self._data):
            raise _Beyond
