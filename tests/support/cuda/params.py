"""The structs of `native/cuda/params*.h` for ctypes, read from these files, so that they are written once."""

import ctypes
import re
from pathlib import Path

_TYPES: dict[str, type] = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "long long": ctypes.c_longlong,
    "unsigned long long": ctypes.c_ulonglong,
    "om_card_address": ctypes.c_ulonglong,
}
_STRUCT = re.compile(r"typedef struct \{(.*?)\} (\w+);", re.DOTALL)
_FIELDS = re.compile(r"(?:const )?((?:unsigned |signed |long )*\w+) ([^;]+);")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


def structs_of(*paths: Path) -> dict[str, type[ctypes.Structure]]:
    """Every struct of headers of plain structs, which use those before them, by name; pointers are `c_void_p`."""
    found: dict[str, type] = dict(_TYPES)
    text = _COMMENT.sub("", "".join(path.read_text() for path in paths))
    for body, name in _STRUCT.findall(text):
        fields = [field for kind, names in _FIELDS.findall(body) for field in _fields_of(found.get(kind), names)]
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return {name: kind for name, kind in found.items() if name not in _TYPES}


def _fields_of(kind: type | None, names: str) -> list[tuple[str, type]]:
    fields = []
    for declared in names.split(","):
        name, _, count = declared.strip().partition("[")
        is_pointer = name.startswith("*")
        this = ctypes.c_void_p if is_pointer else kind
        assert this is not None, f"no type is known for {name}"
        fields.append((name.removeprefix("*const ").lstrip("*"), this * int(count.rstrip("]")) if count else this))
    return fields
