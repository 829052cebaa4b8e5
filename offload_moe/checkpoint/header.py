"""The header of a safetensors file, checked before a byte of data is trusted.

A file is 8 bytes of header length, the JSON header, then the tensors without gaps or overlaps to the last byte.
Source: safetensors format description, https://huggingface.co/docs/safetensors (spaces after the JSON are allowed).
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload_moe.errors import CheckpointError
from offload_moe.system.open_files import open_descriptor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format itself


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """The place of one tensor: `offset` counts from the start of the file."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderCopy:
    """The beginning of a missing safetensors file, and the file's length."""

    path: Path
    file_bytes: int


def read_header(path: Path, copy: HeaderCopy | None = None) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file.

    copy: the beginning of a missing file, read instead.

    Raises:
        CheckpointError: the file is missing, truncated or malformed; the message names it and the tensor.
    """
    try:
        with os.fdopen(open_descriptor(copy.path if copy else path), "rb") as file:
            file_bytes = copy.file_bytes if copy else os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: {file_bytes} bytes. Download the file again; "
                    "where git left a pointer in its place, `git lfs pull` does."
                )
            header = json.loads(file.read(header_bytes), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed header: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a malformed header: not a JSON object.")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + header_bytes) for name, fields in header.items()}
    _check_coverage(path, list(entries.values()), 8 + header_bytes, file_bytes)
    return entries


def _entry(path: Path, name: str, fields: dict[str, Any], data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = [begin, end, *shape]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: the header entry of tensor {name} is malformed.") from None
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: the header entry of tensor {name} is malformed.")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has dtype {dtype}, which this version cannot read.")
    entry = TensorEntry(name=name, path=path, dtype=DTYPES[dtype], shape=tuple(shape), offset=data_start + begin)
    if end - begin != entry.num_bytes:
        raise CheckpointError(
            f"{path}: tensor {name} is {dtype} {shape}, {entry.num_bytes} bytes, but has {end - begin} in the file."
        )
    return entry


def _check_coverage(path: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    """The tensors must tile the rest of the file exactly."""
    position = data_start
    for entry in sorted(entries, key=lambda e: (e.offset, e.num_bytes)):
        if entry.offset != position:
            raise CheckpointError(f"{path}: there is a gap or an overlap before tensor {entry.name}.")
        position += entry.num_bytes
        if position > file_bytes:
            raise CheckpointError(
                f"{path} is truncated inside tensor {entry.name}: {file_bytes} bytes, {position} needed. "
                "Download the file again."
            )
    if position != file_bytes:
        raise CheckpointError(f"{path} has {file_bytes - position} bytes after its last tensor.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result
