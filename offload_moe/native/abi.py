"""Compares structs, functions and constants of a built library with those that this Python code binds.

A library that was built from other sources would read other bytes than Python wrote.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

from offload_moe.errors import NativeLibraryError
from offload_moe.native.constants import CONSTANTS
from offload_moe.native.functions import FUNCTIONS
from offload_moe.native.structs import STRUCTS

ABI_VERSION = 5  # OM_ABI_VERSION of `csrc/api.h`
HOW_TO_REBUILD = "Rebuild it: `scripts/install`, or `pip install --force-reinstall --no-deps .` in the source folder."

_TYPES = {
    "void": None,
    "char": ctypes.c_char,
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "const char *": ctypes.c_char_p,
    **STRUCTS,
}


class _Field(ctypes.Structure):
    """`abi_field`."""

    _fields_ = (
        *((name, ctypes.c_char_p) for name in ("owner", "name", "type")),
        *((name, ctypes.c_int64) for name in ("offset", "num_bytes")),
    )


class _Function(ctypes.Structure):
    """`abi_function`."""

    _fields_ = tuple((name, ctypes.c_char_p) for name in ("result", "name", "parameters"))


class _Constant(ctypes.Structure):
    """`abi_constant`."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int64))


def check(library: ctypes.CDLL) -> None:
    """Check that a library is built from the sources of this Python code. Raises: NativeLibraryError when it is not."""
    try:
        version = ctypes.c_int32.in_dll(library, "om_abi_version").value
        theirs = [fields_of(library), functions_of(library), constants_of(library)] if version == ABI_VERSION else []
    except (ValueError, LookupError) as error:
        raise _stale(str(error)) from error
    if not theirs:
        raise _stale(f"it has version {version} of the interface, and Python has {ABI_VERSION}")
    ours: tuple[dict[str, Any], ...] = _own_fields(), FUNCTIONS, CONSTANTS
    for found, expected in zip(theirs, ours, strict=True):
        if found != expected:
            raise _stale(_first_difference(found, expected))


def declare(library: ctypes.CDLL) -> None:
    """Set the types of the functions of a checked library. Raises: NativeLibraryError when one is missing."""
    for name, (result, *parameters) in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise _stale(f"{name} is not in it") from error
        function.restype, function.argtypes = result, parameters


def fields_of(library: ctypes.CDLL) -> dict[str, Any]:
    """Fields of a library: (type, offset, bytes) by `struct.field`, and the bytes of each struct by its name."""
    found: dict[str, Any] = {}
    for entry in _entries(library, "om_abi_fields", _Field):
        owner, name = entry.owner.decode(), entry.name.decode()
        if name:
            found[f"{owner}.{name}"] = _ctype(entry.type.decode()), entry.offset, entry.num_bytes
        else:
            found[owner] = entry.num_bytes
    return found


def functions_of(library: ctypes.CDLL) -> dict[str, tuple[Any, ...]]:
    """Functions of a library: types of the result and the parameters by name."""
    return {
        entry.name.decode(): (_ctype(entry.result.decode()), *_parameters(entry.parameters.decode()))
        for entry in _entries(library, "om_abi_functions", _Function)
    }


def constants_of(library: ctypes.CDLL) -> dict[str, int]:
    """Constants of a library: values by name."""
    return {entry.name.decode(): entry.value for entry in _entries(library, "om_abi_constants", _Constant)}


def _entries(library: ctypes.CDLL, symbol: str, kind: Any) -> Iterator[Any]:
    """Entries of a list, which ends with an entry of zeros."""
    first = ctypes.addressof(kind.in_dll(library, symbol))
    while (entry := kind.from_address(first)).name is not None:
        yield entry
        first += ctypes.sizeof(kind)


def _own_fields() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for owner, struct in STRUCTS.items():
        found[owner] = ctypes.sizeof(struct)
        for field in struct._fields_:
            name, placed = field[0], getattr(struct, field[0])
            found[f"{owner}.{name}"] = field[1], placed.offset, placed.size
    return found


def _ctype(declared: str) -> Any:
    """The type of a declaration such as `const float *` or `int64_t[2]`; arrays have one class per type and length."""
    if declared.endswith("]"):
        base, length = declared[:-1].split("[")
        return _ctype(base) * int(length)
    return ctypes.c_void_p if "*" in declared and declared not in _TYPES else _TYPES[declared]


def _parameters(declared: str) -> Iterator[Any]:
    """The types in `(const char *name, int64_t length)`; none for `(void)`."""
    for part in declared[1:-1].split(", "):
        if part != "void":
            yield _ctype(part[: part.rindex("*") + 1] if "*" in part else part.rpartition(" ")[0])


def _first_difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    name = next(name for name in {**expected, **found} if found.get(name) != expected.get(name))
    if name not in found or name not in expected:
        return f"{name} is missing in {'Python' if name in found else 'the library'}"
    return f"{name} is {_words(found[name])} in the library and {_words(expected[name])} in Python"


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_words(part) for part in value)})"
    return str(getattr(value, "__name__", value))


def _stale(reason: str) -> NativeLibraryError:
    return NativeLibraryError(f"The native library was built from other sources: {reason}. {HOW_TO_REBUILD}")
