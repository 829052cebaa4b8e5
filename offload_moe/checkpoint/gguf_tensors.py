"""GGUF files beside the original model's config and tokenizer, read under transformers' names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_moe.checkpoint.gguf_file import GgufTensor, read_gguf
from offload_moe.checkpoint.gguf_names import ARCHITECTURES, PERMUTED, fused_experts, transformers_name
from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.shards import safe_path
from offload_moe.checkpoint.tensors import row_chunks
from offload_moe.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPart:
    """Tensors that are one in transformers: gate before up along the rows. num_heads: of a permuted query or key."""

    tensors: tuple[GgufTensor, ...]
    num_heads: int = 0

    def rows(self, start: int, stop: int) -> Tensor:
        if len(self.tensors) > 1:
            return torch.cat([tensor.rows(start, stop) for tensor in self.tensors], dim=1)
        if not self.num_heads:
            return self.tensors[0].rows(start, stop)
        whole = self.tensors[0].rows(0, self.tensors[0].shape[0])
        halves = whole.unflatten(0, (self.num_heads, -1, 2))  # llama.cpp turns pairs of neighbours, transformers halves
        return halves.transpose(1, 2).flatten(0, 2)[start:stop]


class GgufTensors:
    """A model in GGUF, whole or split. Quantized tensors are read as bf16."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Raises: CheckpointError when there are several models, or one of an unknown architecture."""
        self.paths = _parts_of_one_model(folder)
        architecture, tensors = read_gguf(self.paths)
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.paths[0]} is a GGUF file of architecture {architecture!r}; {', '.join(ARCHITECTURES)} can be "
                "read. Use a safetensors version of the model."
            )
        self._parts = {name: _permuted(name, part, architecture, config) for name, part in _parts(tensors)}
        self.entries: Mapping[str, TensorEntry] = {name: _entry(name, part) for name, part in self._parts.items()}

    def paths_of(self, name: str) -> frozenset[Path]:
        return frozenset(tensor.path for tensor in self._parts[name].tensors)

    def release(self, path: Path) -> None:
        """Nothing stays open between reads."""

    def read(self, name: str) -> Tensor:
        return self.read_rows(name, 0, self.entries[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._parts[name].rows(start, stop)

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


def _parts(tensors: Mapping[str, GgufTensor]) -> Iterator[tuple[str, GgufPart]]:
    for name, tensor in tensors.items():
        if both := fused_experts(name):
            up = tensors.get(both[0])
            if up is None or up.shape != tensor.shape or up.dtype != tensor.dtype:
                raise CheckpointError(f"{tensor.path}: tensor {name} has no {both[0]} of its shape.")
            yield both[1], GgufPart(tensors=(tensor, up))
        elif ".ffn_up_exps." not in name and (known := transformers_name(name)) is not None:
            is_vector = known.endswith("mlp.shared_expert_gate.weight") and len(tensor.shape) == 1
            yield known, GgufPart(tensors=(replace(tensor, shape=(1, *tensor.shape)) if is_vector else tensor,))


def _permuted(name: str, part: GgufPart, architecture: str, config: Mapping[str, Any]) -> GgufPart:
    is_key = name.endswith("self_attn.k_proj.weight")
    if architecture not in PERMUTED or not (is_key or name.endswith("self_attn.q_proj.weight")):
        return part
    num_heads = config.get("num_key_value_heads" if is_key else "num_attention_heads")
    rows = part.tensors[0].shape[0]
    if type(num_heads) is not int or num_heads <= 0 or rows % (2 * num_heads):
        raise CheckpointError(f"{part.tensors[0].path}: {name} has {rows} rows, config.json says {num_heads} heads.")
    return GgufPart(tensors=part.tensors, num_heads=num_heads)


def _entry(name: str, part: GgufPart) -> TensorEntry:
    first = part.tensors[0]
    shape = first.shape
    if len(part.tensors) > 1:
        shape = (shape[0], shape[1] * len(part.tensors), *shape[2:])
    return TensorEntry(name=name, path=first.path, dtype=first.dtype, shape=shape, offset=first.offset)
