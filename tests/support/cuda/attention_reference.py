"""The portable C of attention as a library of its own (`attention_reference.c`)."""

import ctypes
import hashlib
import subprocess
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.cuda.bits import Floats, address
from tests.support.cuda.shim import CACHE, ROOT, SHIM

SOURCES = ROOT / "offload_moe" / "native" / "csrc"
FLAGS = ["-std=c11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w"]
ROTATIONS = {"halves": 0, "pairs_to_halves": 1, "pairs": 2}


@cache
def library() -> ctypes.CDLL:
    """Compiled once, and again when a source changes."""
    source = SHIM / "attention_reference.c"
    texts = [path.read_bytes() for path in (source, *sorted(SOURCES.glob("*.[ch]")))]
    path = CACHE / f"reference-{hashlib.sha256(b''.join(texts)).hexdigest()[:24]}.so"
    if not path.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        subprocess.run(["gcc", *FLAGS, f"-I{SOURCES}", source, "-lm", "-o", f"{path}.new"], check=True)
        path.with_name(f"{path.name}.new").replace(path)
    return ctypes.CDLL(str(path))


def _call(name: str, *arguments: Any) -> None:
    """Arrays by address, ints as int64, floats as fp32."""
    converted = [
        ctypes.c_void_p(address(each))
        if each is None or isinstance(each, np.ndarray)
        else ctypes.c_float(each)
        if isinstance(each, float)
        else ctypes.c_int64(each)
        for each in arguments
    ]
    getattr(library(), name)(*converted)


def finish_heads(
    heads: Floats,
    bias: Floats | None,
    norm: Floats | None,
    epsilon: float,
    angles: tuple[Floats, Floats] | None,
    rotation: str,
    *,
    is_normed_rotated: bool = False,
) -> Floats:
    """``[heads, D]`` with its bias, norm (of the weight's length) and rotation (cos and signed sin ``[R]``).

    is_normed_rotated: the norm comes last.
    """
    done = heads.copy()
    cos, sin = angles or (None, None)
    rotated = 0 if cos is None else len(cos)
    lengths = (0 if norm is None else norm.size, epsilon, cos, sin, *heads.shape, rotated, ROTATIONS[rotation])
    _call("finish_heads", done, bias, norm, *lengths, int(is_normed_rotated))
    return done


def scale_queries(queries: Floats, position: int, step: float, strength: float) -> Floats:
    """As of `QueryScale`; step 0 leaves them as they are."""
    scaled = np.ascontiguousarray(queries).copy()
    if step:
        _call("scale_queries", scaled, scaled.size, position, float(step), float(strength))
    return scaled


def multiply_by_gates(values: Floats, gates: Floats) -> Floats:
    """By the gates' sigmoids."""
    product = np.ascontiguousarray(values).copy()
    _call("multiply_by_gates", product, np.ascontiguousarray(gates), product.size)
    return product


def round_to_bf16(values: Floats) -> NDArray[np.uint16]:
    rounded = np.zeros(values.shape, np.uint16)
    _call("round_to_bf16", np.ascontiguousarray(values), values.size, rounded)
    return rounded


def attend(
    query: Floats,
    keys: NDArray[np.uint16],
    more_keys: NDArray[np.uint16] | None,
    values: NDArray[np.uint16],
    scaling: float,
    sinks: Floats | None,
) -> Floats:
    """query ``[N, D + P]``, keys ``[M, S, D]``, more keys ``[1, S, P]``, values ``[M, S, V]`` -> ``[N, V]``."""
    keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
    more_keys = None if more_keys is None else np.ascontiguousarray(more_keys)
    num_kv_heads, count, dim = keys.shape
    more, value_dim = 0 if more_keys is None else more_keys.shape[-1], values.shape[-1]
    num_sections = -(-count // 512)
    scratch = np.zeros(num_sections * 2, np.float32), np.zeros(num_sections * value_dim, np.float32)
    out = np.zeros((len(query), value_dim), np.float32)
    sizes = (len(query), num_kv_heads, count, dim, more, value_dim)
    _call("attend_to", query, keys, more_keys, values, *sizes, float(scaling), sinks, *scratch, out)
    return out


def multiply(matrix: NDArray[Any], first_row: int, num_rows: int, x: Floats) -> Floats:
    """Rows of a matrix in bf16 or fp32 ``[rows, cols]`` times x ``[cols]``."""
    out, is_bf16 = np.zeros(num_rows, np.float32), int(matrix.dtype == np.uint16)
    _call("multiply", matrix, is_bf16, first_row, num_rows, matrix.shape[1], np.ascontiguousarray(x), out)
    return out


def quantize(row: Floats, group: int) -> tuple[NDArray[np.int8], Floats]:
    """Quants in the order of columns, padded to 64, and scales of groups of so many columns."""
    padded = np.zeros(-(-row.size // 64) * 64, np.float32)
    padded[: row.size] = row
    quants, scales = np.zeros(padded.size, np.int8), np.zeros(padded.size // group, np.float32)
    for n in range(scales.size):
        part = slice(n * group, (n + 1) * group)
        _call("quantize_group", padded[part], group, quants[part], scales[n : n + 1])
    return quants, scales
