"""A native library that does not fit this Python code is refused when it is loaded, by what differs."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offload_moe.errors import NativeLibraryError
from offload_moe.native import abi, library, structs
from offload_moe.native.constants import CONSTANTS
from offload_moe.quant.layout import BLOCK

ROOT = Path(__file__).parents[2]
LIBRARY = library.load_library()


class PlaceInAnotherOrder(ctypes.Structure):
    _fields_ = (structs.PlaceStruct._fields_[1], structs.PlaceStruct._fields_[0], *structs.PlaceStruct._fields_[2:])


class PlaceWithoutAField(ctypes.Structure):
    _fields_ = (*structs.PlaceStruct._fields_[:-1],)


class PlaceOfAnotherType(ctypes.Structure):
    """As many bytes at the same places."""

    _fields_ = (*structs.PlaceStruct._fields_[:-1], ("checksum", ctypes.c_float))


def test_the_library_in_use_is_accepted() -> None:
    abi.check(LIBRARY)
    assert abi.fields_of(LIBRARY)["om_place.checksum"] == (ctypes.c_uint32, 52, 4)
    assert abi.fields_of(LIBRARY)["om_layer.norms"] == (ctypes.c_void_p * 2, 32, 16)
    assert abi.functions_of(LIBRARY)["om_num_threads"] == (ctypes.c_int,)
    assert abi.constants_of(LIBRARY)["OM_UNDER_WAY"] == -2


@pytest.mark.parametrize(
    ("struct", "named"),
    [
        (PlaceInAnotherOrder, r"om_place\.num_bytes is \(c_long, 8, 8\) in the library and \(c_long, 0, 8\) in Python"),
        (PlaceWithoutAField, r"om_place\.checksum is missing in Python"),
        (PlaceOfAnotherType, r"om_place\.checksum is \(c_uint, 52, 4\) in the library and \(c_float, 52, 4\)"),
    ],
)
def test_a_struct_with_other_fields_is_refused(
    monkeypatch: pytest.MonkeyPatch, struct: type[ctypes.Structure], named: str
) -> None:
    monkeypatch.setitem(abi.STRUCTS, "om_place", struct)
    with pytest.raises(NativeLibraryError, match=rf"{named}.*Rebuild it"):
        abi.check(LIBRARY)


def test_a_struct_that_only_one_side_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(abi.STRUCTS, "om_new", structs.PlaceStruct)
    with pytest.raises(NativeLibraryError, match="om_new is missing in the library"):
        abi.check(LIBRARY)


@pytest.mark.parametrize(
    ("signature", "named"),
    [
        ((None, ctypes.c_void_p), r"om_rank is \(None, c_void_p, c_void_p, \w+\) in the library"),
        ((None, ctypes.c_void_p, ctypes.c_int64), "om_rank"),
        ((ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p), "om_rank"),
    ],
)
def test_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch, signature: tuple[Any, ...], named: str) -> None:
    monkeypatch.setitem(abi.FUNCTIONS, "om_rank", signature)
    with pytest.raises(NativeLibraryError, match=named):
        abi.check(LIBRARY)


def test_a_function_that_is_not_in_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(abi.FUNCTIONS, "om_new", (None,))
    with pytest.raises(NativeLibraryError, match="om_new is missing in the library"):
        abi.check(LIBRARY)
    with pytest.raises(NativeLibraryError, match="om_new is not in it"):
        abi.declare(LIBRARY)


def test_another_constant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(abi.CONSTANTS, "OM_MISSING", 3)
    with pytest.raises(NativeLibraryError, match="OM_MISSING is 2 in the library and 3 in Python"):
        abi.check(LIBRARY)


@pytest.mark.parametrize("version", [abi.ABI_VERSION - 1, abi.ABI_VERSION + 1])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    ours = abi.ABI_VERSION
    monkeypatch.setattr(abi, "ABI_VERSION", version)
    with pytest.raises(NativeLibraryError, match=f"has version {ours} of the interface, and Python has {version}"):
        abi.check(LIBRARY)


def test_a_library_from_before_the_lists_is_refused() -> None:
    with pytest.raises(NativeLibraryError, match=r"om_abi_version.*Rebuild it"):
        abi.check(ctypes.CDLL(None))


def test_a_file_that_is_no_library_is_a_named_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "_native.so"
    damaged.write_bytes(b"\x7fELF cut off")
    monkeypatch.setattr(library, "_path", lambda: damaged)
    with pytest.raises(NativeLibraryError, match=r"does not load: .*_native\.so.*Rebuild it"):
        library.load_library.__wrapped__()


def test_importing_without_a_library_is_a_named_error(tmp_path: Path) -> None:
    package = tmp_path / "offload_moe"
    shutil.copytree(ROOT / "offload_moe/native", package / "native", ignore=shutil.ignore_patterns("*.so", "csrc"))
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "offload_moe" / name, package)
    command = [sys.executable, "-c", "import offload_moe.native"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    last = run.stderr.splitlines()[-1]
    assert last.startswith("offload_moe.errors.NativeLibraryError: The native library is not built")
    assert "scripts/install" in last


def test_records_and_kernels_have_the_same_blocks() -> None:
    assert CONSTANTS["OM_BLOCK"] == BLOCK
