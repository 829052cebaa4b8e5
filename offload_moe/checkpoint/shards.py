"""The tensors of a checkpoint folder, read by plain positioned reads.

Files are not mapped, because mapped pages count as resident memory, which must stay bounded by a few experts.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from offload_moe.checkpoint.file_bytes import read_bytes
from offload_moe.checkpoint.header import HeaderCopy, TensorEntry, read_header
from offload_moe.checkpoint.weight_files import WeightFiles, choose_weights, file_names, listing, require
from offload_moe.system.open_files import OpenFiles


class Remote(Protocol):
    """A source of missing shards. file_names: of all files of the checkpoint."""

    @property
    def file_names(self) -> Collection[str]: ...

    def header_of(self, path: Path) -> HeaderCopy: ...

    def provide(self, path: Path) -> None:
        """Fetch the file if it is missing."""
        ...


class Shards:
    """Named tensors spread over the safetensors files of one folder. Reads may come from several threads."""

    def __init__(self, folder: Path, remote: Remote | None = None) -> None:
        """Reads and checks every header. Raises: CheckpointError naming the file and the tensor."""
        self._remote = remote
        self._files = OpenFiles()
        present = remote.file_names if remote is not None else None
        weights = choose_weights(folder, present)
        require(folder, weights, present)
        self.paths = tuple(folder / name for name in weights.names)
        self.entries: dict[str, TensorEntry] = {}
        repeated = []
        for path in self.paths:
            found = read_header(path, remote.header_of(path) if remote else None)
            repeated += [name for name in found if name in self.entries]
            self.entries |= found  # the last file takes precedence, as in transformers
        unused = weights.unused(file_names(folder)) if remote is None else None
        self.notices = tuple(notice for notice in (unused, *_contradictions(folder, weights, self.entries)) if notice)
        if repeated:
            self.notices += (
                f"In several files, the last of which is read, as transformers does: {listing(repeated)}.",
            )

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        entry = self.entries[name]
        return self._read(entry, entry.offset, entry.num_bytes).view(entry.dtype).view(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """A slice along the leading dimension, ``[stop - start, ...]``: one expert of a fused tensor."""
        entry = self.entries[name]
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        data = self._read(entry, entry.offset + start * row_bytes, (stop - start) * row_bytes)
        return data.view(entry.dtype).view(stop - start, *entry.shape[1:])

    def is_by_rows(self, name: str) -> bool:
        return True

    def chunks(self, name: str, chunk_bytes: int) -> Iterator[Tensor]:
        """The tensor's bytes in order, uint8, at most `chunk_bytes` at a time."""
        entry = self.entries[name]
        for start in range(0, entry.num_bytes, chunk_bytes):
            yield self._read(entry, entry.offset + start, min(chunk_bytes, entry.num_bytes - start))

    def paths_of(self, name: str) -> frozenset[Path]:
        return frozenset({self.entries[name].path})

    def release(self, path: Path) -> None:
        """Close a shard that is no longer read, so that deleting it frees the disk."""
        self._files.release(path)

    def close(self) -> None:
        self._files.close()

    def _read(self, entry: TensorEntry, offset: int, num_bytes: int) -> Tensor:
        if self._remote is not None:
            self._remote.provide(entry.path)
        data = torch.empty(num_bytes, dtype=torch.uint8)
        read_bytes(entry.path, offset, data, f"tensor {entry.name}", self._files.reading)
        return data


def read_part(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """A slice along the leading dimension, of a file that is opened for it. Raises: as `Shards`."""
    row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    data = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
    read_bytes(entry.path, entry.offset + start * row_bytes, data, f"tensor {entry.name}")
    return data.view(entry.dtype).view(stop - start, *entry.shape[1:])


def _contradictions(folder: Path, weights: WeightFiles, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Notices of differences between index and files. A tensor that the model lacks is an error later."""
    elsewhere = [n for n, file in weights.promised.items() if n in entries and entries[n].path != folder / file]
    if elsewhere:
        yield f"In other files than {weights.index} says, and read from there: {listing(elsewhere)}."
    absent = [name for name in weights.promised if name not in entries]
    if absent:
        yield f"{weights.index} lists tensors that are in no file: {listing(absent)}."
