"""Moments of every expert's and linear's inputs on a text, by which errors are weighed while a model is quantized.

A forward over the text keeps the inputs of each layer in a folder; the moments of a matrix are made of them when it is
encoded, so that those of one expert are in memory. T tokens, t tokens of one expert, K in features.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.convert.calibration_text import CalibrationText
from offload_moe.convert.inputs_folder import InputsFolder
from offload_moe.convert.layerwise import DTYPE, ids_name, record_inputs, reference_of
from offload_moe.convert.numbers import check_finite
from offload_moe.quant.moments import NO_MOMENTS, Moments
from offload_moe.store.manifest import Importances

NUM_OTHERS = 512  # tokens of the layer that every expert is given beside its own
OTHERS_WEIGHT = 0.1  # of one of them: an expert with few tokens of its own is weighed by the layer's
MOST_COLUMNS = 8192  # a matrix with more of them is weighed by mean squares alone: products would take gigabytes
LAYERS_IN_MEMORY = 2

Kind = Literal["experts", "linears"]


class Calibration:
    """The moments on one text. Its forward runs before the first is needed, and is resumed where it was stopped."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: CalibrationText,
        linears: Sequence[str],
        folder: InputsFolder,
        *,
        feeds_back: Collection[Kind],
    ) -> None:
        """linears: modules that are quantized. feeds_back: kinds of matrices whose products of inputs are needed."""
        self.importances = Importances(kind="text", name=text.name, sha256=text.sha256)
        self._checkpoint = checkpoint
        self._text = text
        self._linears = linears
        self._folder = folder
        self._feeds_back = feeds_back
        self._arithmetics = [reference_of(layer) for layer in checkpoint.layers]
        self._of_layer = lru_cache(LAYERS_IN_MEMORY)(self._read_layer)

    def prepare(self, settings: Mapping[str, Any]) -> None:
        self._folder.open(settings)
        if not self._folder.is_complete:
            record_inputs(self._checkpoint, self._text.ids, self._linears, self._folder)
            self._folder.complete()

    def remove(self) -> None:
        self._folder.remove()

    def of_expert(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> Moments:
        if not self._folder.has(self._checkpoint.layers[layer].name):
            return NO_MOMENTS
        hidden, ids = self._of_layer(layer)
        own = hidden[(ids == expert).any(dim=1)]
        others = hidden[_spread(len(hidden))]
        rows = torch.cat([own, others]).to(DTYPE)
        weights = torch.cat([torch.ones(len(own)), torch.full((len(others),), OTHERS_WEIGHT)])[:, None]
        first, last = self._checkpoint.layers[layer].shape.matrices
        wide = {name: value.to(DTYPE) for name, value in tensors.items()}
        check_finite(wide)
        inner = self._arithmetics[layer].first_half(rows, wide)
        return {
            matrix.name: self._moments("experts", inputs, weights) for matrix, inputs in ((first, rows), (last, inner))
        }

    def of_linear(self, name: str) -> Moments:
        if not self._folder.has(name):
            return NO_MOMENTS
        rows = self._folder.read(name).to(DTYPE)
        return {"weight": self._moments("linears", rows, torch.ones(len(rows), 1))}

    def _read_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        name = self._checkpoint.layers[layer].name
        return self._folder.read(name), self._folder.read(ids_name(name))

    def _moments(self, kind: Kind, rows: Tensor, weights: Tensor) -> Tensor:
        """Inputs ``[t, K]``, weights ``[t, 1]`` -> ``[K]`` or ``[K, K]``."""
        if kind in self._feeds_back and rows.shape[1] <= MOST_COLUMNS:
            return (rows * weights).T @ rows / weights.sum()
        return (rows.square() * weights).sum(0) / weights.sum()


def _spread(num_tokens: int) -> Tensor:
    """Ascending numbers of tokens of which every position of a sequence has its share."""
    mixed = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))
    return mixed[:NUM_OTHERS].sort().values
