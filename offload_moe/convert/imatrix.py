"""Importances out of llama.cpp's importance matrix: mean squares of the inputs of experts and linears."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.checkpoint.gguf_names import architecture_of, transformers_name
from offload_moe.checkpoint.imatrix import SquareSums, read_imatrix
from offload_moe.errors import CheckpointError
from offload_moe.quant.moments import NO_MOMENTS, Moments
from offload_moe.store.manifest import Importances

PRIOR = 32  # inputs that count as the layer's mean: an expert with few of its own is weighed by it
EXPERTS = ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
DOWN = "ffn_down_exps"
_BLOCK = re.compile(r"blk\.(\d+)\.")


class ImportanceMatrix:
    """The moments of experts and linears of a checkpoint, from one file."""

    def __init__(self, path: Path, checkpoint: Checkpoint, linears: Sequence[str]) -> None:
        """linears: modules that are quantized. Raises: CheckpointError for a file of another model."""
        self._path = path
        found = read_imatrix(path)
        self.importances = Importances(kind="imatrix", name=path.name, sha256=_sha256(path))
        _check_blocks(path, found, checkpoint)
        self._experts = [self._means_of_layer(layer, found) for layer in checkpoint.layers]
        architecture = architecture_of(checkpoint.model.config.model_type)
        names = {transformers_name(name, architecture): name for name in found}
        self._linears = {
            linear: self._means(names[f"{linear}.weight"], found, 1, checkpoint.dense[f"{linear}.weight"].shape[1])[0]
            for linear in linears
            if f"{linear}.weight" in names
        }
        without = [linear for linear in linears if linear not in self._linears]
        self.notices = [
            f"{path.name} has no importances of {len(without)} quantized linears ({first}, ...): their errors are not "
            "weighed."
            for first in without[:1]
        ]

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Everything is read."""

    def remove(self) -> None:
        """Nothing is kept."""

    def of_expert(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> Moments:
        return {matrix: means[expert] for matrix, means in self._experts[layer].items()}

    def of_linear(self, name: str) -> Moments:
        return {"weight": self._linears[name]} if name in self._linears else NO_MOMENTS

    def _means_of_layer(self, layer: ExpertsModule, found: Mapping[str, SquareSums]) -> dict[str, Tensor]:
        """Matrix -> ``[E, K]``."""
        number = _number_of(layer.name)
        first, last = layer.shape.matrices
        means = {}
        for matrix, kinds in ((first, EXPERTS[:-1]), (last, (DOWN,))):
            names = [f"blk.{number}.{kind}.weight" for kind in kinds]
            name = next((name for name in names if name in found), names[-1])
            means[matrix.name] = self._means(name, found, layer.num_experts, matrix.in_features)
        return means

    def _means(self, name: str, found: Mapping[str, SquareSums], num_matrices: int, num_columns: int) -> Tensor:
        """``[num_matrices, num_columns]``. Raises: CheckpointError."""
        if name not in found:
            raise CheckpointError(
                f"{self._path} has no importances of {name}. Use the importance matrix of this model, or leave "
                "--imatrix out."
            )
        of_matrices = found[name].of_matrices(num_matrices)
        num_rows, num_sums = of_matrices.sums.shape
        if (num_rows, num_sums) != (num_matrices, num_columns):
            raise CheckpointError(
                f"{self._path} is of another model: {name} has {num_rows} x {num_sums} importances, this model's "
                f"matrices have {num_matrices} x {num_columns} inputs."
            )
        return of_matrices.means(PRIOR)


def _check_blocks(path: Path, found: Mapping[str, SquareSums], checkpoint: Checkpoint) -> None:
    """Refuse a file with other layers than the model. Raises: CheckpointError."""
    numbers = [int(match[1]) for name in found if (match := _BLOCK.match(name))]
    config = checkpoint.model.config.get_text_config(decoder=True)
    num_layers = config.num_hidden_layers
    num_ahead = getattr(config, "num_nextn_predict_layers", None) or 0  # layers for multi-token prediction come last
    if numbers and max(numbers) >= num_layers + num_ahead:
        raise CheckpointError(
            f"{path} is of another model: it has importances of layer {max(numbers)}, this one has {num_layers} layers."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _number_of(name: str) -> int:
    """The number of the decoder layer that an experts module belongs to."""
    return int(next(part for part in name.split(".") if part.isdigit()))
