"""The structs of `native/cuda/params*.h` for Python, read from the headers: one text for the card, the host's C and tests."""

import ctypes
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from support.cuda.shim import KERNELS

_NUMBERS = {
    "int": ctypes.c_int,
    "unsigned": ctypes.c_uint,
    "float": ctypes.c_float,
    "long long": ctypes.c_longlong,
    "unsigned long long": ctypes.c_ulonglong,
}
_STRUCT = re.compile(r"typedef struct(?: \w+)? \{([^{}]*)\} (\w+);")
_TYPE = re.compile(r"typedef ([\w ]+) (\w+);")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_FIELD = re.compile(r"((?:const |volatile |unsigned |long )*\w+)\s+(.*)", re.DOTALL)


@cache
def structs(*headers: str) -> Mapping[str, type[ctypes.Structure]]:
    """Of these headers of `native/cuda`, in the order in which they use each other. Pointers are addresses."""
    text = _COMMENT.sub(" ", "".join(Path(KERNELS, header).read_text() for header in headers))
    types: dict[str, type] = dict(_NUMBERS)
    types |= {name: types[of] for of, name in _TYPE.findall(text) if of in types}
    found: dict[str, type[ctypes.Structure]] = {}
    for body, name in _STRUCT.findall(text):
        fields = [field for line in body.split(";") if line.strip() for field in _fields(line.strip(), types)]
        types[name] = found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def _fields(declaration: str, types: Mapping[str, type]) -> list[tuple[str, type]]:
    """Of ``const float *a, *b[3], c``."""
    matched = _FIELD.fullmatch(declaration)
    assert matched, declaration
    kind = re.sub(r"\b(const|volatile)\b", "", matched[1]).strip()
    fields = []
    for part in matched[2].split(","):
        name, _, count = part.strip().rstrip("]").partition("[")
        is_pointer = "*" in name
        field: type = ctypes.c_void_p if is_pointer else types[kind]
        fields.append((name.split("*")[-1].replace("const", "").strip(), field * int(count) if count else field))
    return fields
