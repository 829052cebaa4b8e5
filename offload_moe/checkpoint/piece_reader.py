"""Reading one expert at a time from models with one parameter per expert, or with experts stacked along rows."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offload_moe.checkpoint.expert_reader import WEIGHT_DTYPES
from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.checkpoint.names import SourceGroup
from offload_moe.checkpoint.tensors import TensorSource
from offload_moe.errors import CheckpointError, UnsupportedModelError
from offload_moe.families import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PieceReader:
    """Reads the experts of one MoE layer; everything is checked against the headers before the first read."""

    is_packed = False

    def __init__(
        self, layer: ExpertsModule, groups: list[SourceGroup], model: "PreTrainedModel", tensors: TensorSource
    ) -> None:
        self._layer = layer
        self._tensors = tensors
        self._sources: dict[str, str] = {}
        for group in groups:
            if group.converter is not None:
                raise UnsupportedModelError(
                    f"{group.target} is converted from {group.names[0]}, but it can only be read as it is."
                )
            self._sources[group.target] = group.names[0]
        for name in layer.parameter_names():
            self._check(name, tuple(model.get_parameter(name).shape))

    def read(self, expert: int) -> dict[str, Tensor]:
        """The tensors of one expert, keyed by their names in the record."""
        found = {}
        for name, parts in self._layer.parts.items():
            pieces = [self._piece(part, expert) for part in parts]
            found[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return found

    def names(self, expert: int) -> list[str]:
        """The checkpoint's tensors that hold this expert."""
        return [self._source(part, expert) for parts in self._layer.parts.values() for part in parts]

    def read_packed(self, expert: int) -> dict[str, Tensor]:
        raise AssertionError("only where is_packed")

    def _source(self, part: Part, expert: int) -> str:
        return self._sources[f"{self._layer.name}.{part.parameter.format(expert)}"]

    def _piece(self, part: Part, expert: int) -> Tensor:
        source = self._source(part, expert)
        if part.is_apart:
            piece = self._tensors.read(source)
        elif part.num_rows:
            piece = self._tensors.read_rows(source, expert * part.num_rows, (expert + 1) * part.num_rows)
        else:
            piece = self._tensors.read_rows(source, expert, expert + 1)[0]
        return piece.T if part.is_transposed else piece

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._sources:
            raise CheckpointError(f"No tensor of the checkpoint brings {name}.")
        entry = self._tensors.entries[self._sources[name]]
        if tuple(entry.shape) != shape or entry.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}, expected floating point "
                f"weights {list(shape)}."
            )
