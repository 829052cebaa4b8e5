"""GGUF files beside the original model's config and tokenizer, read under transformers' names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from offload_moe.checkpoint.gguf_file import read_gguf
from offload_moe.checkpoint.gguf_names import ARCHITECTURES
from offload_moe.checkpoint.gguf_parts import GgufPart, parts
from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.tensors import row_chunks
from offload_moe.checkpoint.weight_files import safe_path
from offload_moe.errors import CheckpointError


class GgufTensors:
    """A model in GGUF, whole or split. Quantized tensors are read as bf16."""

    notices: tuple[str, ...] = ()

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Raises: CheckpointError when there are several models, or one of an unknown architecture."""
        self.paths = _parts_of_one_model(folder)
        architecture, tensors = read_gguf(self.paths)
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.paths[0]} is a GGUF file of architecture {architecture!r}; {', '.join(ARCHITECTURES)} can be "
                "read. Use a safetensors version of the model."
            )
        self._parts = dict(parts(tensors, architecture, config))
        self.entries: Mapping[str, TensorEntry] = {name: _entry(name, part) for name, part in self._parts.items()}

    def paths_of(self, name: str) -> frozenset[Path]:
        return frozenset(tensor.path for tensor in self._parts[name].tensors)

    def release(self, path: Path) -> None:
        """Nothing stays open between reads."""

    def read(self, name: str) -> Tensor:
        return self.read_rows(name, 0, self.entries[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._parts[name].rows(start, stop)

    def is_by_rows(self, name: str) -> bool:
        return True

    def chunks(self, name: str, chunk_bytes: int) -> Iterator[Tensor]:
        return row_chunks(self, name, chunk_bytes)

    def close(self) -> None:
        """Nothing stays open between reads."""


def _parts_of_one_model(folder: Path) -> tuple[Path, ...]:
    paths = sorted(folder.glob("*.gguf"))
    stems = {
        path.stem.rsplit("-of-", 1)[0].rstrip("0123456789") if "-of-" in path.stem else path.stem for path in paths
    }
    if len(stems) > 1:
        raise CheckpointError(
            f"{folder} holds {len(stems)} models in GGUF ({paths[0].name}, {paths[-1].name}). Keep one of them there."
        )
    return tuple(safe_path(folder, path.name) for path in paths)


def _entry(name: str, part: GgufPart) -> TensorEntry:
    first = part.tensors[0]
    return TensorEntry(name=name, path=first.path, dtype=part.dtype, shape=part.shape(), offset=first.offset)
