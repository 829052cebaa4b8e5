"""GGUF files beside the original model's config and tokenizer, read under transformers' names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from offload_moe.checkpoint.gguf_experts import GgufExperts, stacked
from offload_moe.checkpoint.gguf_families import FAMILIES
from offload_moe.checkpoint.gguf_file import GgufTensor, read_gguf
from offload_moe.checkpoint.gguf_parts import GgufPart, parts
from offload_moe.checkpoint.gguf_split import PART, parts_beside
from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.mxfp4 import BLOCKS
from offload_moe.checkpoint.tensors import row_chunks
from offload_moe.checkpoint.weight_files import safe_path
from offload_moe.errors import CheckpointError

FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class GgufTensors:
    """A model in GGUF, whole or split. Quantized tensors are read as bf16."""

    notices: tuple[str, ...] = ()

    def __init__(self, paths: tuple[Path, ...], config: Mapping[str, Any]) -> None:
        """Open the files of one model. Raises: CheckpointError for an unknown architecture."""
        self.paths = paths
        model = read_gguf(self.paths)
        architecture = model.architecture
        if architecture not in FAMILIES:
            raise CheckpointError(
                f"{self.paths[0]} is a GGUF file of architecture {architecture!r}; {', '.join(FAMILIES)} can be "
                "read. Use a safetensors version of the model."
            )
        self.is_swapped = model.is_swapped
        self.stored: Mapping[str, GgufTensor | GgufExperts] = stacked(model.tensors)
        self.parts: Mapping[str, GgufPart] = dict(parts(self.stored, architecture, text_config(config)))
        self.entries: Mapping[str, TensorEntry] = {name: _entry(name, part) for name, part in self.parts.items()}

    @property
    def is_mxfp4(self) -> bool:
        """Whether all experts keep the bits of MXFP4."""
        return any(name.endswith(BLOCKS) for name in self.entries) and not any(
            name.endswith(FUSED_EXPERTS) for name in self.entries
        )

    def paths_of(self, name: str) -> frozenset[Path]:
        return frozenset().union(*(tensor.paths for tensor in self.parts[name].tensors))

    def release(self, path: Path) -> None:
        """Nothing stays open between reads."""

    def read(self, name: str) -> Tensor:
        return self.read_rows(name, 0, self.entries[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.parts[name].rows(start, stop)

    def is_by_rows(self, name: str) -> bool:
        return True

    def chunks(self, name: str, chunk_bytes: int) -> Iterator[Tensor]:
        return row_chunks(self, name, chunk_bytes)

    def close(self) -> None:
        """Nothing stays open between reads."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that is about the language model; all of it where that part is missing or null."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def parts_in(folder: Path) -> tuple[Path, ...]:
    """The files of the folder's model. Raises: CheckpointError for several models, or parts that are missing."""
    names = sorted(path.name for path in folder.glob("*.gguf"))
    models = {(match["model"], match["count"]) if (match := PART.fullmatch(name)) else (name, "") for name in names}
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} holds {len(models)} models in GGUF ({names[0]}, {names[-1]}). Keep one of them there."
        )
    return tuple(safe_path(folder, path.name) for path in parts_beside(folder / names[0]))


def _entry(name: str, part: GgufPart) -> TensorEntry:
    first = part.tensors[0]
    return TensorEntry(name=name, path=first.path, dtype=part.dtype, shape=part.shape(), offset=first.offset)
