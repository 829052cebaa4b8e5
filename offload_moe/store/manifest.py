"""The manifest of an expert store, `store.json`: contents and their places."""

import re
from dataclasses import dataclass, replace

import torch

from offload_moe.quant import ABSMAX, ExpertShape
from offload_moe.store.order import Order

MTP = "mtp."  # before the names of what only guesses need: the layer for multi-token prediction
DATA_FILE = re.compile(r"(dense|experts|mtp)-\d{5}(-panels)?\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One MoE layer: the experts module's name, the number of experts, and the shape of each.

    codec: of its experts, if each layer has its own.
    """

    name: str
    num_experts: int
    record_bytes: int
    shape: ExpertShape
    codec: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A run of bytes in one file of the store, and its CRC-32."""

    file: int
    offset: int
    num_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseEntry:
    """A dense tensor, or, if `quantized` is set, the record of a quantized linear of that shape.

    codec: of the record, if each has its own. is_lookup: it is an embedding's, whose rows stay in order.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: Place
    quantized: ExpertShape | None = None
    codec: str | None = None
    is_lookup: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of the store, its size and its CRC-32."""

    name: str
    num_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile(StoredFile):
    """A file of tensors, with the CRC-32 of its header. order: of the rows in all of its records."""

    order: Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Importances:
    """What the errors of nf4 and int8 were weighed by.

    kind: "imatrix" or "text". name: of its file, or "auto". sha256: of the file, or of the text's token ids.
    """

    kind: str
    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapter:
    """An adapter that is part of the weights: the name of its folder, and the SHA-256 of its weights and settings."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of `store.json`. `experts` are places in flat order, layer after layer; `scales` those of nf4 and int8.

    Layers and dense tensors whose names begin with `MTP` are of the layer for multi-token prediction; these layers are
    the last ones.
    """

    source: str
    revision: str | None
    codec: str
    dense_codec: str
    scales: str = ABSMAX
    importances: Importances | None = None
    adapter: MergedAdapter | None = None
    layers: tuple[Layer, ...]
    files: tuple[DataFile, ...]
    experts: tuple[Place, ...]
    dense: tuple[DenseEntry, ...]
    metadata: tuple[StoredFile, ...]

    @property
    def num_layers(self) -> int:
        """MoE layers of the model itself."""
        return sum(not layer.name.startswith(MTP) for layer in self.layers)

    @property
    def mtp(self) -> "Manifest | None":
        """The part for multi-token prediction alone, under the names that its module has; None where there is none."""
        layers = self.layers[self.num_layers :]
        if not layers:
            return None
        num_before = sum(layer.num_experts for layer in self.layers[: self.num_layers])
        return replace(
            self,
            layers=tuple(replace(layer, name=layer.name.removeprefix(MTP)) for layer in layers),
            experts=self.experts[num_before:],
            dense=tuple(
                replace(entry, name=entry.name.removeprefix(MTP)) for entry in self.dense if entry.name.startswith(MTP)
            ),
        )
