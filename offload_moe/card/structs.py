"""The structs of the card's kernels for ctypes, read from the headers that the kernels are compiled with.

Pointers are addresses in the card's memory.
"""

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Any

from offload_moe import native

HEADERS = ("params.h", "params_attention.h", "pass.h")
KERNELS = Path(native.__file__).parent / "cuda"
_NUMBERS = {
    "int": ctypes.c_int32,
    "unsigned": ctypes.c_uint32,
    "float": ctypes.c_float,
    "unsigned long long": ctypes.c_uint64,
    "long long": ctypes.c_int64,
}
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_CONSTANT = re.compile(r"^#define (\w+) \(?(-?\d+)\)?\s*$", re.MULTILINE)
_ALIAS = re.compile(r"typedef ([\w ]+) (\w+);")
_STRUCT = re.compile(r"typedef struct \{(.*?)\} (\w+);", re.DOTALL)
_DECLARATOR = re.compile(r"(?P<pointers>[\s*]*(?:const\s*)?\**)\s*(?P<name>\w+)\s*(?:\[(?P<length>\w+)\])?$")
_QUALIFIERS = re.compile(r"\b(const|volatile)\b")


def declared(text: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Constants and types of the text of headers, in which each type uses only earlier ones."""
    text = _COMMENT.sub(" ", text)
    constants = {name: int(value) for name, value in _CONSTANT.findall(text)}
    types: dict[str, Any] = dict(_NUMBERS)
    for aliased, name in _ALIAS.findall(text):
        types[name] = types[aliased]
    for body, name in _STRUCT.findall(text):
        fields = [field for line in body.split(";") if line.strip() for field in _fields(line, types, constants)]
        types[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return constants, types


@cache
def _declared() -> tuple[dict[str, int], dict[str, Any]]:
    return declared("\n".join((KERNELS / name).read_text(encoding="utf-8") for name in HEADERS))


def struct(name: str) -> Any:
    """The class of `om_card_<name>`."""
    return _declared()[1][f"om_card_{name}"]


def constant(name: str) -> int:
    """A number that a header defines."""
    return _declared()[0][name]


def _fields(line: str, types: dict[str, Any], constants: dict[str, int]) -> list[tuple[str, Any]]:
    """The fields of a declaration such as ``const float *cos, *signed_sin`` or ``int tokens[OM_CARD_ROWS]``."""
    line = _QUALIFIERS.sub(" ", line).strip()
    first, *others = line.split(",")
    found = _DECLARATOR.search(first)
    assert found is not None, line
    base = " ".join(first[: found.start()].split())
    fields = []
    for declarator in (first[found.start() :], *others):
        match = _DECLARATOR.search(declarator.strip())
        assert match is not None, line
        kind = ctypes.c_void_p if "*" in match["pointers"] else types[base]
        length = match["length"]
        if length is not None:
            kind = kind * (int(length) if length.isdigit() else constants[length])
        fields.append((match["name"], kind))
    return fields
