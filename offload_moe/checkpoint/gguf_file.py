"""The tensors of GGUF files, read by plain positioned reads and dequantized by the `gguf` package."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload_moe.checkpoint.file_bytes import read_bytes
from offload_moe.checkpoint.gguf_header import AGAIN, GgufHeader, TensorPlace, fetch_header
from offload_moe.errors import CheckpointError
from offload_moe.system.open_files import open_descriptor

KEPT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Read in big-endian files. For other types the gguf package writes unswapped bytes, its gguf_convert_endian swaps
# them, and a file does not record which of the two wrote it. MXFP4 consists of single bytes.
BIG_ENDIAN = ("F32", "F16", "MXFP4")
DEFAULT_ALIGNMENT = 32
ADVICE = "Use another quantization of the model, or a safetensors version."


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """The place of one tensor; `kind` is the name of its type, such as Q4_K. Quantized ones are read as bf16.

    is_swapped: its byte order differs from this machine's.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    is_swapped: bool = False

    @property
    def paths(self) -> frozenset[Path]:
        return frozenset({self.path})

    @property
    def dtype(self) -> torch.dtype:
        return KEPT_DTYPES.get(self.kind, torch.bfloat16)

    @property
    def row_bytes(self) -> int:
        """Bytes of the last dimension."""
        return self.num_bytes // math.prod(self.shape[:-1])

    def item(self, index: int) -> "GgufTensor":
        """One of its items along the leading dimension."""
        num_bytes = self.num_bytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + index * num_bytes, num_bytes=num_bytes)

    def raw(self, start: int, stop: int) -> Tensor:
        """The bytes of a slice along the leading dimension, uint8 ``[stop - start, ..., row_bytes]``."""
        return self._slice(start, stop).view(stop - start, *self.shape[1:-1], self.row_bytes)

    def rows(self, start: int, stop: int) -> Tensor:
        """A slice along the leading dimension. Raises: CheckpointError, TransferError."""
        data = self._slice(start, stop)
        shape = (stop - start, *self.shape[1:])
        if self.kind in KEPT_DTYPES:
            if self.is_swapped:
                data = data.view(-1, self.dtype.itemsize).flip(1).contiguous().view(-1)
            return data.view(self.dtype).view(shape)
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind]
        values = gguf.dequantize(data.view(math.prod(shape[:-1]), -1).numpy(), kind)
        return torch.from_numpy(values).view(shape).to(self.dtype)

    def _slice(self, start: int, stop: int) -> Tensor:
        item_bytes = self.num_bytes // self.shape[0]
        data = torch.empty((stop - start) * item_bytes, dtype=torch.uint8)
        read_bytes(self.path, self.offset + start * item_bytes, data, f"tensor {self.name}")
        return data


@dataclass(frozen=True, slots=True)
class GgufModel:
    """The parts of one model: metadata of the first, tensors of all by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name; empty for a file of another kind."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def is_swapped(self) -> bool:
        """Whether the byte order of a file differs from this machine's."""
        return any(tensor.is_swapped for tensor in self.tensors.values())


def read_gguf(paths: Sequence[Path]) -> GgufModel:
    """The metadata and every tensor of the parts of one model.

    Raises:
        CheckpointError: a file is damaged, truncated, of a type that cannot be dequantized, or one part of several.
    """
    metadata: Mapping[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for path in paths:
        header, size = _header_of(path)
        metadata = metadata or header.metadata
        num_parts = header.metadata.get("split.count", 0)
        if type(num_parts) is not int or num_parts > len(paths):
            raise CheckpointError(
                f"{path} is one part of a GGUF file in {num_parts}, of which {len(paths)} are there. Put the "
                "others beside it, all under the names that they were published with."
            )
        for tensor in _tensors_of(path, header, size):
            if tensor.name in tensors:
                raise CheckpointError(f"{path}: tensor {tensor.name} is there twice. {AGAIN}")
            tensors[tensor.name] = tensor
    return GgufModel(metadata, tensors)


def _header_of(path: Path) -> tuple[GgufHeader, int]:
    """The header of a file, and the file's length."""

    def first(count: int) -> bytes:
        file.seek(0)
        return file.read(min(count, size))

    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is no file. Name a GGUF file.")
        with os.fdopen(open_descriptor(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return fetch_header(first, size, str(path))[0], size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _tensors_of(path: Path, header: GgufHeader, size: int) -> Iterator[GgufTensor]:
    """The tensors of a file of this length. Raises: CheckpointError for one that is not all its own bytes in there."""
    beginning = header.num_bytes + -header.num_bytes % _alignment(path, header)
    end, before = beginning, "its header"
    for place in sorted(header.tensors, key=lambda place: place.start):
        tensor = _tensor(path, place, beginning + place.start, header.is_swapped)
        if tensor.offset < end:
            raise CheckpointError(f"{path}: tensor {tensor.name} begins within {before}. {AGAIN}")
        end, before = tensor.offset + tensor.num_bytes, f"tensor {tensor.name}"
        if end > size:
            raise CheckpointError(
                f"{path}: tensor {tensor.name} is cut short: it ends at byte {end}, and the file at {size}. {AGAIN}"
            )
        yield tensor


def _alignment(path: Path, header: GgufHeader) -> int:
    """Tensors begin at its multiples."""
    found = header.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(found) is not int or found <= 0 or found & (found - 1):
        raise CheckpointError(f"{path}: general.alignment is {found!r}, not a power of two. {AGAIN}")
    return found


def _tensor(path: Path, place: TensorPlace, offset: int, is_swapped: bool) -> GgufTensor:
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(place.kind)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: tensor {place.name} is of type {place.kind}, which the gguf package does not have; forks of "
            f"llama.cpp write such types. {ADVICE}"
        ) from error
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if 0 in place.shape or place.shape[-1] % per_block:
        raise CheckpointError(
            f"{path}: tensor {place.name} in {kind.name} is {list(place.shape)}, which is empty or has rows that are "
            f"no multiple of {per_block}. {AGAIN}"
        )
    if len(place.shape) == 1 and per_block > 1:
        raise CheckpointError(
            f"{path}: tensor {place.name} is a vector in {kind.name}; vectors are read in {', '.join(KEPT_DTYPES)}. "
            f"{ADVICE}"
        )
    num_bytes = math.prod(place.shape) // per_block * block_bytes
    tensor = GgufTensor(
        path=path,
        name=place.name,
        kind=kind.name,
        shape=place.shape,
        offset=offset,
        num_bytes=num_bytes,
        is_swapped=is_swapped,
    )
    _check_is_readable(tensor)
    return tensor


def _check_is_readable(tensor: GgufTensor) -> None:
    if tensor.kind == "NVFP4" or not _is_dequantized(tensor.kind):
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} is {tensor.kind}, which cannot be dequantized. {ADVICE}"
        )
    if tensor.is_swapped and tensor.kind not in BIG_ENDIAN:
        raise CheckpointError(
            f"{tensor.path} is a big-endian GGUF file. Its tensor {tensor.name} is {tensor.kind}, whose bytes programs "
            f"write in either order; {', '.join(BIG_ENDIAN)} can be read. Use a little-endian file, or a safetensors "
            "version of the model."
        )


@cache
def _is_dequantized(kind: str) -> bool:
    import gguf

    quantized = gguf.GGMLQuantizationType[kind]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[quantized][1]), dtype=np.uint8), quantized)
    except NotImplementedError:
        return False
    return True
