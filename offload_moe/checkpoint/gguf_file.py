"""The tensors of GGUF files, read by plain positioned reads and dequantized by the `gguf` package."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload_moe.errors import CheckpointError, TransferError

KEPT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies; `kind` is the name of its type, such as Q4_K. Quantized ones are read as bf16."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return KEPT_DTYPES.get(self.kind, torch.bfloat16)

    @property
    def row_bytes(self) -> int:
        """Of the last dimension."""
        return self.num_bytes // math.prod(self.shape[:-1])

    def raw(self, start: int, stop: int) -> Tensor:
        """The bytes of a slice along the leading dimension, uint8 ``[stop - start, ..., row_bytes]``."""
        return self._slice(start, stop).view(stop - start, *self.shape[1:-1], self.row_bytes)

    def rows(self, start: int, stop: int) -> Tensor:
        """A slice along the leading dimension. Raises: CheckpointError, TransferError."""
        data = self._slice(start, stop)
        shape = (stop - start, *self.shape[1:])
        if self.kind in KEPT_DTYPES:
            return data.view(self.dtype).view(shape)
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind]
        values = gguf.dequantize(data.view(math.prod(shape[:-1]), -1).numpy(), kind)
        return torch.from_numpy(values).view(shape).to(self.dtype)

    def _slice(self, start: int, stop: int) -> Tensor:
        item_bytes = self.num_bytes // self.shape[0]
        return self._read(self.offset + start * item_bytes, (stop - start) * item_bytes)

    def _read(self, offset: int, num_bytes: int) -> Tensor:
        data = torch.empty(num_bytes, dtype=torch.uint8)
        view, done = data.numpy().data, 0
        try:
            with self.path.open("rb", buffering=0) as file:
                while done < num_bytes and (count := os.preadv(file.fileno(), [view[done:]], offset + done)):
                    done += count
        except OSError as error:
            raise TransferError(f"{self.path}: reading tensor {self.name} failed: {error.strerror}.") from error
        if done < num_bytes:
            raise CheckpointError(f"{self.path} is truncated inside tensor {self.name}.")
        return data


def read_gguf(paths: Iterable[Path]) -> tuple[str, dict[str, GgufTensor]]:
    """The architecture and every tensor of the parts of one model.

    Raises:
        CheckpointError: a file is damaged, cut short or of a type that cannot be dequantized.
    """
    import gguf

    architecture, tensors = "", {}
    for path in paths:
        try:
            reader = gguf.GGUFReader(path)
            field = reader.fields.get("general.architecture")
            architecture = str(field.contents()) if field else architecture
            found = [_tensor(path, tensor) for tensor in reader.tensors]
        except Exception as error:  # the package trusts its file, so a damaged one fails in any way it likes
            raise CheckpointError(
                f"{path} is not a GGUF file, or a damaged one: {error!r}. Download it again."
            ) from error
        size = path.stat().st_size
        for tensor in found:
            if tensor.offset + tensor.num_bytes > size or tensor.name in tensors or 0 in tensor.shape:
                raise CheckpointError(f"{path}: tensor {tensor.name} is empty, cut short or there twice.")
            if not _is_readable(tensor.kind):
                raise CheckpointError(f"{path}: tensor {tensor.name} is {tensor.kind}, which cannot be dequantized.")
            tensors[tensor.name] = tensor
    return architecture, tensors


def _tensor(path: Path, tensor: Any) -> GgufTensor:
    return GgufTensor(
        path=path,
        name=str(tensor.name),
        kind=tensor.tensor_type.name,
        shape=tuple(int(size) for size in reversed(tensor.shape)),
        offset=int(tensor.data_offset),
        num_bytes=int(tensor.n_bytes),
    )


@cache
def _is_readable(kind: str) -> bool:
    import gguf

    quantized = gguf.GGMLQuantizationType[kind]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[quantized][1]), dtype=np.uint8), quantized)
    except NotImplementedError:
        return False
    return True
