"""The bytes of a model in GGUF as records: where each expert's parts lie, and the types of dense matrices."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.checkpoint.file_bytes import read_bytes
from offload_moe.checkpoint.gguf_experts import GgufExperts
from offload_moe.checkpoint.gguf_file import GgufTensor
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.quant.bf16 import Bf16Codec
from offload_moe.quant.gguf import TYPES, GgufCodec, gguf_codec
from offload_moe.quant.layout import ExpertShape, RecordLayout, weight_shape
from offload_moe.quant.panels import PANEL_ROWS

LOSSLESS = Bf16Codec()
MTP_LEFT_OUT = (
    "The layer for multi-token prediction of the GGUF file is left out where types are kept; `offload-moe quantize` "
    "with a --codec keeps it. Answers are the same without it."
)
Stored = GgufTensor | GgufExperts


@dataclass(frozen=True, slots=True)
class FileRun:
    """A run of bytes of a file, and where they belong in a record."""

    path: Path
    offset: int
    num_bytes: int
    target: int


@dataclass(frozen=True, slots=True)
class PartSource:
    """A tensor ``[E, ...]``; each expert takes one of so many equal runs of its item, which belongs at `target`."""

    tensor: Stored
    share: int
    num_shares: int
    target: int

    def run(self, expert: int) -> FileRun:
        """The bytes of one expert."""
        item = self.tensor.item(expert)
        num_bytes = item.num_bytes // self.num_shares
        return FileRun(item.path, item.offset + self.share * num_bytes, num_bytes, self.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecords:
    """The experts of one layer. sources: by ascending target."""

    name: str
    num_experts: int
    shape: ExpertShape
    codec: GgufCodec | Bf16Codec
    sources: tuple[PartSource, ...]

    def runs(self, expert: int) -> tuple[FileRun, ...]:
        """Where the parts of an expert's record lie."""
        return tuple(source.run(expert) for source in self.sources)


class GgufRecords:
    """The records of a checkpoint in GGUF, for which nothing is quantized anew."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Find every expert. Raises: CheckpointError naming a tensor of them whose type or width has no kernel."""
        assert checkpoint.gguf is not None
        assert not checkpoint.gguf.is_swapped  # refused with the metadata
        self.checkpoint = checkpoint
        self._stored, self._parts = checkpoint.gguf.stored, checkpoint.gguf.parts
        self.layers = tuple(self._layer(layer) for layer in checkpoint.layers)

    @property
    def notices(self) -> tuple[str, ...]:
        """For the user, about what is left out."""
        return (*self.checkpoint.notices, *((MTP_LEFT_OUT,) if self.checkpoint.mtp is not None else ()))

    @cached_property
    def lookup_name(self) -> str:
        """The name of the embedding's weight."""
        model = self.checkpoint.model
        table = model.get_input_embeddings()
        return next((f"{name}.weight" for name, module in model.named_modules() if module is table), "")

    def read_expert(self, layer: int, expert: int) -> Tensor:
        """The record in rows, uint8 ``[record_bytes]``."""
        records = self.layers[layer]
        record = torch.zeros(records.codec.layout(records.shape).record_bytes, dtype=torch.uint8)
        for run in records.runs(expert):
            read_bytes(run.path, run.offset, record[run.target : run.target + run.num_bytes], f"expert {expert}")
        return record

    def dense_codec(self, name: str) -> GgufCodec | None:
        """The codec of a dense matrix that keeps its type; None where it is read as numbers."""
        return self._dense_codecs.get(name)

    def read_dense(self, name: str) -> Tensor:
        """The record of a dense matrix in rows, uint8. Only of those that have a codec."""
        record = torch.zeros(self._layout(name).record_bytes, dtype=torch.uint8)
        at = 0
        for rows in self.dense_rows(name, record.numel()):
            record[at : at + rows.numel()] = rows.reshape(-1)
            at += rows.numel()
        return record

    def dense_rows(self, name: str, most_bytes: int) -> Iterator[Tensor]:
        """What `read_dense` joins: uint8 ``[rows, row bytes]``, whole panels of rows of about so many bytes.

        All rows at once where they change places.
        """
        part = self._parts[name]
        num_rows, num_bytes = part.shape()[0], self._layout(name).record_bytes
        together = num_rows if part.is_whole else most_bytes * num_rows // num_bytes // PANEL_ROWS * PANEL_ROWS
        for start in range(0, num_rows, max(PANEL_ROWS, together)):
            stop = min(start + max(PANEL_ROWS, together), num_rows)
            ends = [(0, tensor.shape[0]) if part.is_whole else (start, stop) for tensor in part.tensors]
            yield part.join(*(tensor.raw(*each) for tensor, each in zip(part.tensors, ends, strict=True)))

    def _layout(self, name: str) -> RecordLayout:
        return self._dense_codecs[name].layout(weight_shape(*self._parts[name].shape()))

    @cached_property
    def _dense_codecs(self) -> dict[str, GgufCodec]:
        matrices = _matrices(self.checkpoint)
        if type(self.checkpoint.model.get_input_embeddings()) is nn.Embedding:  # a subclass may scale what it looks up
            matrices.add(self.lookup_name)
        found = {}
        for name in self.checkpoint.dense:
            part = self._parts.get(name)
            if name in matrices and part is not None and part.keeps_rows and _keeps_kind(part.tensors[0]):
                found[name] = gguf_codec([part.tensors[0].kind])
        return found

    def _layer(self, layer: ExpertsModule) -> LayerRecords:
        block = re.search(r"\.layers\.(\d+)\.", f".{layer.name}.")
        if block is None or not layer.shape.has_gate:
            raise CheckpointError(f"{layer.name}: experts of this kind are not read out of GGUF files as they lie.")
        stem = f"blk.{block[1]}.ffn_"
        tensors = [*self._gate_and_up(stem, "weight"), (self._stored[f"{stem}down_exps.weight"], 0, 1)]
        codec = _codec_of(layer.shape, [tensor for tensor, _, _ in tensors])
        planes = {name: plane.offset for name, plane in codec.layout(layer.shape).planes.items()}
        targets = _targets(codec, layer.shape, planes, tensors)
        for name, _ in layer.shape.biases:
            is_down = name.startswith("down_proj")
            found = [(self._stored[f"{stem}down_exps.bias"], 0, 1)] if is_down else self._gate_and_up(stem, "bias")
            tensors += found
            targets += [planes[f"{name}.values"] + index * _bias_bytes(found[0][0]) for index in range(len(found))]
        return LayerRecords(
            name=layer.name,
            num_experts=layer.num_experts,
            shape=layer.shape,
            codec=codec,
            sources=tuple(PartSource(*source, target) for source, target in zip(tensors, targets, strict=True)),
        )

    def _gate_and_up(self, stem: str, kind: str) -> list[tuple[Stored, int, int]]:
        joint = self._stored.get(f"{stem}gate_up_exps.{kind}")
        if joint is not None:
            return [(joint, 0, 2), (joint, 1, 2)]
        return [(self._stored[f"{stem}{half}_exps.{kind}"], 0, 1) for half in ("gate", "up")]


def _targets(
    codec: GgufCodec | Bf16Codec,
    shape: ExpertShape,
    planes: Mapping[str, int],
    tensors: Sequence[tuple[Stored, int, int]],
) -> list[int]:
    """Where gate, up and down begin in a record."""
    if isinstance(codec, GgufCodec):
        return [planes[part.plane] for part in codec.parts(shape)]
    gate, num_shares = tensors[0][0], tensors[0][2]
    first, second = planes.values()
    return [first, first + gate.item(0).num_bytes // num_shares, second]


def _bias_bytes(tensor: Stored) -> int:
    """Of one expert's. Raises: CheckpointError for biases in another type than F32, as llama.cpp writes none."""
    if tensor.kind != "F32":
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name} is {tensor.kind}; biases of experts are F32.")
    return tensor.item(0).num_bytes


def _codec_of(shape: ExpertShape, tensors: Sequence[Stored]) -> GgufCodec | Bf16Codec:
    if all(tensor.kind == "BF16" for tensor in tensors) and not shape.biases and not shape.is_transposed:
        return LOSSLESS
    for tensor in tensors:
        if tensor.kind not in TYPES:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} is {tensor.kind}, which is not computed as it lies; "
                f"{', '.join(TYPES)} are. Use another quantization of the model."
            )
        try:
            TYPES[tensor.kind].row_bytes(tensor.shape[-1])
        except ConfigError as error:
            raise CheckpointError(f"{tensor.path}: tensor {tensor.name} has {error}.") from error
    codec = gguf_codec([tensor.kind for tensor in tensors])
    codec.parts(shape)
    return codec


def _keeps_kind(tensor: Stored) -> bool:
    """Whether a dense matrix keeps its type: bf16 and fp32 are the types of numbers that are read."""
    kind = TYPES.get(tensor.kind)
    return kind is not None and kind.name not in ("BF16", "F32") and kind.takes(tensor.shape[-1])


def _matrices(checkpoint: Checkpoint) -> set[str]:
    """Weights of linears, which may stay in a type of GGUF."""
    return {f"{name}.weight" for name, module in checkpoint.model.named_modules() if type(module) is nn.Linear}
