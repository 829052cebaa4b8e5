"""The tensors of a checkpoint folder, read by plain positioned reads.

Reads rather than mapped files: mapped pages count as resident memory, and RAM must stay bounded by a few experts.
"""

import json
import math
import os
import threading
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from offload_moe.checkpoint.header import HeaderCopy, TensorEntry, read_header
from offload_moe.errors import CheckpointError, TransferError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_PATTERNS = ("*.bin", "*.pth", "*.pt", "*.ckpt")


class Remote(Protocol):
    """Where shards come from that are not in the folder."""

    def header_of(self, path: Path) -> HeaderCopy: ...

    def provide(self, path: Path) -> None:
        """Bring the file, unless it is there."""
        ...


class Shards:
    """Named tensors spread over the safetensors files of one folder. Reads may come from several threads."""

    def __init__(self, folder: Path, remote: Remote | None = None) -> None:
        """Reads and checks every header. Raises: CheckpointError naming the file and the tensor."""
        self._remote = remote
        self.entries: dict[str, TensorEntry] = {}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        promised = _weight_map(folder, is_single=remote is not None)
        self.paths = tuple(safe_path(folder, name) for name in sorted(set(promised.values())))
        for path in self.paths:
            for name, entry in read_header(path, remote.header_of(path) if remote else None).items():
                if name in self.entries:
                    raise CheckpointError(f"Tensor {name} is both in {self.entries[name].path} and in {path}.")
                self.entries[name] = entry
        for name, file_name in promised.items():
            if name and (name not in self.entries or self.entries[name].path.name != Path(file_name).name):
                raise CheckpointError(f"{folder / INDEX_NAME} says tensor {name} is in {file_name}; it is not.")

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
        """Close a shard that is not read any more, so that deleting it frees the disk."""
        with self._lock:
            if (descriptor := self._descriptors.pop(path, None)) is not None:
                os.close(descriptor)

    def close(self) -> None:
        for path in list(self._descriptors):
            self.release(path)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                if self._remote is not None:
                    self._remote.provide(path)
                self._descriptors[path] = _open(path)
            return self._descriptors[path]

    def _read(self, entry: TensorEntry, offset: int, num_bytes: int) -> Tensor:
        descriptor = self._descriptor(entry.path)
        data = torch.empty(num_bytes, dtype=torch.uint8)
        buffer = data.numpy().data
        done = 0
        while done < num_bytes:
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise TransferError(f"{entry.path}: reading tensor {entry.name} failed: {error.strerror}.") from error
            if count == 0:
                raise CheckpointError(
                    f"{entry.path} is truncated inside tensor {entry.name}: {offset + num_bytes} bytes needed."
                )
            done += count
        return data


def shard_names(folder: Path, present: Container[str]) -> list[Path]:
    """The shards that the index of a folder names, or the single file; `present` says which files there are.

    Raises: CheckpointError when one is missing or leads out of the folder.
    """
    if not (folder / INDEX_NAME).exists() and SINGLE_NAME not in present:
        raise CheckpointError(f"{folder} has no safetensors. Choose a model that has.")
    names = sorted(set(_weight_map(folder).values())) if (folder / INDEX_NAME).exists() else [SINGLE_NAME]
    for name in names:
        if name not in present:
            raise CheckpointError(f"{folder / INDEX_NAME} names {name}, which is not there.")
    return [safe_path(folder, name) for name in names]


def safe_path(folder: Path, name: str) -> Path:
    """`folder/name`, refusing names that lead out of the folder.

    The hub's cache keeps a snapshot as links into `blobs/` next to it; only there may a link lead out.

    Raises:
        CheckpointError: the name escapes.
    """
    path = folder / name
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    try:
        real = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, links in a circle
        raise CheckpointError(f"{folder}: {name!r} is no file name: {error}.") from error
    if Path(name).is_absolute() or ".." in Path(name).parts or not any(real.is_relative_to(a) for a in allowed):
        raise CheckpointError(f"{folder}: the file name {name!r} leads out of the checkpoint folder; refused.")
    return path


def _weight_map(folder: Path, is_single: bool = False) -> dict[str, str]:
    """Tensor name -> shard file name; a single file promises no names, so its entry has an empty one."""
    index = folder / INDEX_NAME
    if index.exists():
        try:
            weight_map = json.loads(safe_path(folder, INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
            pairs = [(name, file_name) for name, file_name in weight_map.items() if isinstance(file_name, str)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a shard index: {error!r}.") from error
        if not pairs or len(pairs) != len(weight_map):
            raise CheckpointError(f"{index} is not a shard index: its weight_map is empty or not made of file names.")
        return dict(pairs)
    if (folder / SINGLE_NAME).exists() or is_single:
        return {"": SINGLE_NAME}
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has only a pickle checkpoint ({pickles[0]}): loading one can run any code, so it is refused. "
            "Use a safetensors version of the model."
        )
    raise CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}.")


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
