"""The tensors of a checkpoint by name, either stored in a file or made from stored ones."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.errors import CheckpointError


class TensorSource(Protocol):
    """Named tensors of one checkpoint folder. Reads may come from several threads."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor by name; `dtype` and `shape` are those of a read."""
        ...

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that are read."""
        ...

    @property
    def notices(self) -> tuple[str, ...]:
        """Notices for the user about the files."""
        ...

    def paths_of(self, name: str) -> frozenset[Path]:
        """The files that hold this tensor."""
        ...

    def release(self, path: Path) -> None:
        """Close a file that is no longer read."""
        ...

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """A slice along the leading dimension, ``[stop - start, ...]``."""
        ...

    def is_by_rows(self, name: str) -> bool:
        """Whether reading a few rows needs only the memory of a few rows."""
        ...

    def chunks(self, name: str, chunk_bytes: int) -> Iterator[Tensor]:
        """The tensor's bytes in order, uint8, about `chunk_bytes` at a time."""
        ...

    def close(self) -> None: ...


class Recipe(Protocol):
    """The construction of one tensor from stored ones."""

    @property
    def is_by_rows(self) -> bool:
        """Whether a few rows can be made without reading the whole tensor."""
        ...

    @property
    def entry(self) -> TensorEntry:
        """The resulting tensor; its `path` is the file of the first ingredient."""
        ...

    @property
    def ingredients(self) -> tuple[str, ...]:
        """Names of its stored tensors, which are not tensors of the model themselves."""
        ...

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """A slice along the leading dimension."""
        ...


class DequantizedTensors:
    """A quantized checkpoint, read as numbers."""

    def __init__(self, stored: TensorSource, recipes: Sequence[Recipe]) -> None:
        """Raises: CheckpointError when a weight is stored both quantized and unquantized."""
        self.stored = stored
        self.recipes = {recipe.entry.name: recipe for recipe in recipes}
        used = {name for recipe in recipes for name in recipe.ingredients}
        plain = {name: entry for name, entry in stored.entries.items() if name not in used}
        for recipe in recipes:
            if recipe.entry.name in plain:
                raise CheckpointError(f"{recipe.entry.path}: tensor {recipe.entry.name} is there twice.")
        self.entries: Mapping[str, TensorEntry] = plain | {name: r.entry for name, r in self.recipes.items()}
        self.paths = stored.paths
        self.notices = stored.notices

    def paths_of(self, name: str) -> frozenset[Path]:
        recipe = self.recipes.get(name)
        parts = recipe.ingredients if recipe else (name,)
        return frozenset().union(*(self.stored.paths_of(part) for part in parts))

    def release(self, path: Path) -> None:
        self.stored.release(path)

    def read(self, name: str) -> Tensor:
        if name not in self.recipes:
            return self.stored.read(name)
        return self.read_rows(name, 0, self.entries[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        recipe = self.recipes.get(name)
        return recipe.rows(self.stored, start, stop) if recipe else self.stored.read_rows(name, start, stop)

    def is_by_rows(self, name: str) -> bool:
        recipe = self.recipes.get(name)
        return recipe.is_by_rows if recipe else self.stored.is_by_rows(name)

    def chunks(self, name: str, chunk_bytes: int) -> Iterator[Tensor]:
        if name not in self.recipes:
            yield from self.stored.chunks(name, chunk_bytes)
            return
        yield from row_chunks(self, name, chunk_bytes)

    def close(self) -> None:
        self.stored.close()


def row_chunks(source: TensorSource, name: str, chunk_bytes: int) -> Iterator[Tensor]:
    """`TensorSource.chunks` by reading rows."""
    for rows in row_runs(source, name, chunk_bytes):
        yield rows.contiguous().reshape(-1).view(torch.uint8)


def row_runs(source: TensorSource, name: str, run_bytes: int) -> Iterator[Tensor]:
    """A tensor's rows in order, about `run_bytes` at a time."""
    entry = source.entries[name]
    row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    step = max(1, run_bytes // max(1, row_bytes))
    for start in range(0, entry.shape[0], step):
        yield source.read_rows(name, start, min(start + step, entry.shape[0]))
