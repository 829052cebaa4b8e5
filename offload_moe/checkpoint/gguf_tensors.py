"""GGUF files beside the original model's config and tokenizer, read under transformers' names."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from offload_moe.checkpoint.gguf_file import read_gguf
from offload_moe.checkpoint.gguf_names import ARCHITECTURES
from offload_moe.checkpoint.gguf_parts import GgufPart, parts
from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.mxfp4 import BLOCKS
from offload_moe.checkpoint.tensors import row_chunks
from offload_moe.checkpoint.weight_files import safe_path
from offload_moe.errors import CheckpointError

PART = re.compile(r"(?P<model>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.gguf")
MAX_PARTS = 10_000
FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class GgufTensors:
    """A model in GGUF, whole or split. Quantized tensors are read as bf16."""

    notices: tuple[str, ...] = ()

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Open the folder's model. Raises: CheckpointError for several models, or an unknown architecture."""
        self.paths = _parts_of_one_model(folder)
        architecture, tensors = read_gguf(self.paths)
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.paths[0]} is a GGUF file of architecture {architecture!r}; {', '.join(ARCHITECTURES)} can be "
                "read. Use a safetensors version of the model."
            )
        self._parts = dict(parts(tensors, architecture, config))
        self.entries: Mapping[str, TensorEntry] = {name: _entry(name, part) for name, part in self._parts.items()}

    @property
    def is_mxfp4(self) -> bool:
        """Whether all experts keep the bits of MXFP4."""
        return any(name.endswith(BLOCKS) for name in self.entries) and not any(
            name.endswith(FUSED_EXPERTS) for name in self.entries
        )

    def paths_of(self, name: str) -> frozenset[Path]:
        return frozenset().union(*(tensor.paths for tensor in self._parts[name].tensors))

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
    names = sorted(path.name for path in folder.glob("*.gguf"))
    models = {(match["model"], match["count"]) if (match := PART.fullmatch(name)) else (name, "") for name in names}
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} holds {len(models)} models in GGUF ({names[0]}, {names[-1]}). Keep one of them there."
        )
    if first := PART.fullmatch(names[0]):
        _check_parts(folder, names, first)
    return tuple(safe_path(folder, name) for name in names)


def _check_parts(folder: Path, names: list[str], first: re.Match[str]) -> None:
    """Check that all parts exist. Raises: CheckpointError naming the missing parts."""
    model, digits, count = first["model"], len(first["number"]), first["count"]
    if int(count) > MAX_PARTS:
        raise CheckpointError(f"{folder / names[0]}: {int(count)} parts of one GGUF file are too many to be meant.")
    wanted = [f"{model}-{number:0{digits}d}-of-{count}.gguf" for number in range(1, int(count) + 1)]
    if missing := [name for name in wanted if name not in names]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{folder}: of the {int(count)} parts of this GGUF file {len(missing)} are missing: "
            f"{', '.join(missing[:3])}{more}. Download them into this folder."
        )


def _entry(name: str, part: GgufPart) -> TensorEntry:
    first = part.tensors[0]
    return TensorEntry(name=name, path=first.path, dtype=part.dtype, shape=part.shape(), offset=first.offset)
