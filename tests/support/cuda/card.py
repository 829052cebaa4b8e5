"""The card's kernels in the shim: programs, memory, and the parts of a layer as calls.

T rows, R the rows that a kernel is compiled for, H hidden, I intermediate, K experts of a row.
"""

import ctypes
import os
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from offload_moe.card.linears import input_codec
from offload_moe.native.structs import MatrixStruct
from offload_moe.quant.gguf import PREFIX
from tests.support.cuda import on_driver, shim
from tests.support.cuda.params import structs_of

SOURCES = Path(os.environ.get("OM_CARD_SOURCES", shim.KERNELS))  # of `scripts/card_mutations`, which changes them
STRUCTS = structs_of(SOURCES / "params.h")
_LIBC = ctypes.CDLL(None)
MODE = os.environ.get("OM_SHIM_MODE", "plain")
# Of each kind of kernel: its parameters, and as C expressions its threads and what its number of blocks depends on.
KINDS = {
    "NORM": ("om_card_norm_params", "OM_NORM_THREADS", "1"),
    "QUANTIZE": ("om_card_quantize_params", "OM_QUANTIZE_THREADS", "OM_QUANTIZE_BLOCKS({0})"),
    "SCALE": ("om_card_scale_params", "OM_QUANTIZE_THREADS", "OM_QUANTIZE_BLOCKS({0})"),
    "LINEAR": ("om_card_linear_params", "OM_LINEAR_THREADS({0}, {1}, {2})", "OM_LINEAR_GROUP({0}, {1}) * 16"),
    "VALUES": ("om_card_linear_params", "OM_VALUES_THREADS", "16"),
    "FIRST": ("om_card_first_params", "OM_FIRST_THREADS({0}, {1}, {3}, {5})", "OM_FIRST_BLOCKS({2})"),
    "SECOND": ("om_card_second_params", "OM_SECOND_THREADS({0}, {1}, {3})", "OM_SECOND_BLOCKS({0}, {2}, {1})"),
    "MLP_FIRST": ("om_card_mlp_first_params", "OM_FIRST_THREADS({0}, {2}, {4}, 1)", "OM_FIRST_BLOCKS({3})"),
    "MLP_SECOND": (
        "om_card_mlp_second_params",
        "OM_SECOND_THREADS({0}, {1}, {3})",
        "OM_SECOND_BLOCKS({0}, {2}, {1})",
    ),
    "VALUES_FIRST": ("om_card_values_first_params", "OM_VALUES_THREADS", "OM_VALUES_BLOCKS({2})"),
    "VALUES_SECOND": ("om_card_values_second_params", "OM_VALUES_THREADS", "OM_VALUES_BLOCKS({2})"),
    "EMBED": ("om_card_embed_params", "OM_EMBED_THREADS", "OM_EMBED_BLOCKS({1})"),
    "GREATEST": ("om_card_choose_params", "OM_GREATEST_THREADS", "1"),
    "CHOOSE": ("om_card_choose_params", "OM_CHOOSE_THREADS", "1"),
}
GROUPS = {"nf4": 1, "int8": 1, "mxfp4": 2}  # of a block


def codec_name(codec: str, part: int = 0) -> str:
    """In a kernel's line: of a record, or of a part of one in GGUF's types."""
    if codec.startswith(PREFIX):
        kind = codec.removeprefix(PREFIX).split(",")[part]
        return "OM_GGUF_MXFP4" if kind == "MXFP4" else f"OM_{kind}"
    return f"OM_{codec.upper()}"


def inputs_for(codec: str, taken: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """`om_card_input[3]` with the input of a codec alone."""
    return [taken if name == input_codec(codec) else {} for name in GROUPS]


def name_of(kind: str, *sizes: object) -> str:
    return "_".join(["om", kind.lower(), *(str(size).removeprefix("OM_").lower() for size in sizes)])


def program(kernels_wanted: Sequence[tuple[Any, ...]]) -> str:
    """The text of a program with these kernels, each a kind and its sizes, and how each is launched."""
    lines = ['#include "kernels.cuh"']
    for kind, *sizes in kernels_wanted:
        name, (_, threads, blocks) = name_of(kind, *sizes), KINDS[kind]
        lines.append(f"OM_DEFINE_{kind}({', '.join(map(str, [name, *sizes]))})")
        numbers = ", ".join(part.format(*sizes) for part in (threads, blocks))
        lines.append(f'extern "C" __attribute__((visibility("default"))) const int launch_{name}[] = {{{numbers}}};')
    return "\n".join(lines) + "\n"


class Card:
    """A compiled program and the memory of a pass. seed: the order of threads and blocks."""

    def __init__(self, wanted: Sequence[tuple[Any, ...]], num_rows: int, *, seed: int = 0) -> None:
        self._wanted = tuple(wanted)
        self.num_rows, self.seed = num_rows, seed
        self.stop = np.zeros(1, np.int32)
        self._rows = np.array([num_rows], np.int32)

    def run(
        self, kind: str, sizes: Sequence[object], params: dict[str, Any], *, rows: Sequence[int] = (), y: int = 1
    ) -> None:
        """Launch a kernel. rows: of the matrices of a linear. y: the grid's second dimension."""
        name, compiled = name_of(kind, *sizes), _loaded(((kind, *sizes),) if MODE == "quick" else self._wanted)
        if isinstance(compiled, on_driver.DriverLibrary):
            threads, blocks = (on_driver.evaluate(part.format(*sizes)) for part in KINDS[kind][1:])
        else:
            threads, blocks = (ctypes.c_int * 2).in_dll(compiled.library, f"launch_{name}")
        grid = sum(-(-count // blocks) for count in rows) if rows else blocks
        struct = STRUCTS[KINDS[kind][0]]()
        fill(struct, {"pass": {"stop": self.stop, "num_rows": self._rows}, **params})
        compiled.launch(name, (grid, y), (threads,), struct, seed=self.seed)

    def input(self, codec: str, cols: int, rows: int) -> dict[str, np.ndarray]:
        """Memory for an input of so many rows, poisoned."""
        blocks = -(-cols // 64)
        quants = aligned(rows * blocks * 64, np.int8)
        quants[:] = 77
        return {"quants": quants, "scales": np.full(rows * blocks * GROUPS[input_codec(codec)], np.nan, np.float32)}


def aligned(count: int, dtype: Any) -> np.ndarray:
    """Memory that begins at a multiple of 256 bytes, and ends with its last element: what lies behind is not ours."""
    size, start = count * np.dtype(dtype).itemsize, ctypes.c_void_p()
    assert _LIBC.posix_memalign(ctypes.byref(start), ctypes.c_size_t(256), ctypes.c_size_t(max(size, 1))) == 0
    memory = (ctypes.c_uint8 * size).from_address(start.value or 0)
    weakref.finalize(memory, _LIBC.free, start)
    return np.frombuffer(memory, dtype)


def copied(values: np.ndarray) -> np.ndarray:
    """The same values in such memory."""
    copy = aligned(values.size, values.dtype)
    copy[:] = values.reshape(-1)
    return copy


def fill(struct: ctypes.Structure, values: dict[str, Any]) -> None:
    """Set fields: arrays become addresses, dicts structs, lists arrays."""
    for field, value in values.items():
        current = getattr(struct, field)
        if isinstance(value, dict):
            fill(current, value)
        elif isinstance(value, list):
            for index, each in enumerate(value):
                if isinstance(each, dict):
                    fill(current[index], each)
                else:
                    current[index] = _address(each)
        else:
            setattr(struct, field, _address(value))


def _address(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    return value.data_ptr() if hasattr(value, "data_ptr") else value


def matrix(struct: MatrixStruct) -> dict[str, int]:
    """A matrix of a record as the card reads it."""
    names = ("codes", "scales", "nested_scales", "nested_offset", "bias", "bias_dtype", "rows")
    return {name: getattr(struct, name) for name in names}


@cache
def _loaded(wanted: tuple[tuple[Any, ...], ...]) -> shim.ShimLibrary | on_driver.DriverLibrary:
    return load_program(program(wanted))


def load_program(text: str) -> shim.ShimLibrary | on_driver.DriverLibrary:
    """Compiled for the CPU, or, where one is named, for a driver."""
    if on_driver.is_wanted():
        return on_driver.DriverLibrary(text)
    return shim.ShimLibrary(shim.build(text, [f"-I{SOURCES}"], mode=MODE))


def bits(values: np.ndarray) -> np.ndarray:
    """Bits of fp32 values; all NaNs are one."""
    values = np.asarray(values, np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.int32)
