"""The tensors of GGUF files, read by plain positioned reads and dequantized by the `gguf` package."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload_moe.checkpoint.file_bytes import read_bytes
from offload_moe.errors import CheckpointError

KEPT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Read in big-endian files. For other types the gguf package writes unswapped bytes, its gguf_convert_endian swaps
# them, and a file does not record which of the two wrote it. MXFP4 consists of single bytes.
BIG_ENDIAN = ("F32", "F16", "MXFP4")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """One file: its tensors, and its metadata; num_parts is 0 if it has none."""

    architecture: str
    num_parts: int
    tensors: tuple[GgufTensor, ...]


def read_gguf(paths: Iterable[Path]) -> tuple[str, dict[str, GgufTensor]]:
    """The architecture and every tensor of the parts of one model.

    Raises:
        CheckpointError: a file is damaged, truncated, of a type that cannot be dequantized, or one part of several.
    """
    paths = tuple(paths)
    architecture = ""
    tensors: dict[str, GgufTensor] = {}
    for path in paths:
        file = _read(path)
        architecture = file.architecture or architecture
        if file.num_parts > len(paths):
            raise CheckpointError(
                f"{path} is one part of a GGUF file in {file.num_parts}, of which {len(paths)} are there. Put the "
                "others beside it, all under the names that they were published with."
            )
        size = path.stat().st_size
        for tensor in file.tensors:
            if tensor.offset + tensor.num_bytes > size or tensor.name in tensors or 0 in tensor.shape:
                raise CheckpointError(f"{path}: tensor {tensor.name} is empty, cut short or there twice.")
            _check_is_readable(tensor)
            tensors[tensor.name] = tensor
    return architecture, tensors


def _read(path: Path) -> GgufFile:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        architecture, num_parts = (reader.fields.get(key) for key in ("general.architecture", "split.count"))
        return GgufFile(
            architecture=str(architecture.contents()) if architecture else "",
            num_parts=int(num_parts.contents()) if num_parts else 0,
            tensors=tuple(_tensor(path, tensor, reader.byte_order == "S") for tensor in reader.tensors),
        )
    except Exception as error:  # the package does not check its file, so a damaged one may raise anything
        if "is not a valid GGMLQuantizationType" in str(error):
            raise CheckpointError(
                f"{path} is a GGUF file with a type of tensors that the gguf package does not have ({error}); "
                f"forks of llama.cpp write such types. {ADVICE}"
            ) from error
        raise CheckpointError(f"{path} is not a GGUF file, or a damaged one: {error!r}. Download it again.") from error


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


def _tensor(path: Path, tensor: Any, is_swapped: bool) -> GgufTensor:
    return GgufTensor(
        path=path,
        name=str(tensor.name),
        kind=tensor.tensor_type.name,
        shape=tuple(int(size) for size in reversed(tensor.shape)),
        offset=int(tensor.data_offset),
        num_bytes=int(tensor.n_bytes),
        is_swapped=is_swapped,
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
