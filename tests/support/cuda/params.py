"""The structs of `native/cuda/*.h` for tests, by the parser of the device pass: one text for the card, C and Python."""

import ctypes
from functools import cache
from pathlib import Path

from offload_moe.card.structs import declared
from tests.support.cuda.shim import KERNELS


def structs_of(path: Path) -> dict[str, type[ctypes.Structure]]:
    """Every struct of a header, by name; pointers are `c_void_p`."""
    return _structs(path.read_text())


@cache
def structs(*headers: str) -> dict[str, type[ctypes.Structure]]:
    """Of these headers of `native/cuda`, in the order in which they use each other."""
    return _structs("\n".join(Path(KERNELS, header).read_text() for header in headers))


def _structs(text: str) -> dict[str, type[ctypes.Structure]]:
    return {name: kind for name, kind in declared(text)[1].items() if isinstance(kind, type(ctypes.Structure))}
