"""The bytes of a model in GGUF as records: where each expert's parts lie, and the types of dense matrices."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.checkpoint.gguf_experts import GgufExperts
from offload_moe.checkpoint.gguf_file import GgufTensor, read_bytes
from offload_moe.checkpoint.gguf_parts import GgufPart
from offload_moe.checkpoint.gguf_tensors import GgufTensors
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.quant.bf16 import Bf16Codec
from offload_moe.quant.gguf import TYPES, GgufCodec, gguf_codec
from offload_moe.quant.layout import ExpertShape, weight_shape

LOSSLESS = Bf16Codec()
Stored = GgufTensor | GgufExperts


@dataclass(frozen=True, slots=True)
class FileRun:
    """A run of bytes of a file, and where they belong in a record."""

    path: Path
    offset: int
    num_bytes: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecords:
    """The experts of one layer. sources: in the order of a record, with the share of an expert's rows that is taken."""

    name: str
    num_experts: int
    shape: ExpertShape
    codec: GgufCodec | Bf16Codec
    sources: tuple[tuple[Stored, int, int], ...]  # tensor, which of how many runs of its rows

    def runs(self, expert: int) -> tuple[FileRun, ...]:
        """Where the parts of an expert's record lie."""
        found, planes = [], [*self.codec.layout(self.shape).planes.values()]
        target = planes[0].offset
        for index, (tensor, share, num_shares) in enumerate(self.sources):
            whole = tensor.item(expert)
            num_bytes = whole.num_bytes // num_shares
            if isinstance(self.codec, GgufCodec):
                target = planes[index].offset
            elif index == len(self.sources) - 1:
                target = planes[-1].offset
            found.append(FileRun(whole.path, whole.offset + share * num_bytes, num_bytes, target))
            target += num_bytes
        return tuple(found)


class GgufRecords:
    """The records of a checkpoint in GGUF, for which nothing is quantized anew."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Find every expert. Raises: CheckpointError naming a tensor of them whose type or width has no kernel."""
        assert isinstance(checkpoint.tensors, GgufTensors)
        self.checkpoint = checkpoint
        self._stored = checkpoint.tensors.stored
        self.layers = tuple(self._layer(layer) for layer in checkpoint.layers)

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
        codec, part = self._dense_codecs[name], self._parts[name]
        shape = weight_shape(*part.shape())
        raw = part.join(part.tensors[0].raw(0, part.tensors[0].shape[0]))
        return codec.encode(shape, {"weight.codes": raw})

    @cached_property
    def _parts(self) -> Mapping[str, GgufPart]:
        assert isinstance(self.checkpoint.tensors, GgufTensors)
        return self.checkpoint.tensors.parts

    @cached_property
    def _dense_codecs(self) -> dict[str, GgufCodec]:
        matrices = _matrices(self.checkpoint)
        if type(self.checkpoint.model.get_input_embeddings()) is nn.Embedding:  # a subclass may scale what it looks up
            matrices.add(self.lookup_name)
        found = {}
        for name in self.checkpoint.dense:
            part = self._parts.get(name)
            if name in matrices and part is not None and part.keeps_rows and _kind_fits(part.tensors[0]):
                found[name] = gguf_codec([part.tensors[0].kind])
        return found

    def _layer(self, layer: ExpertsModule) -> LayerRecords:
        block = re.search(r"\.layers\.(\d+)\.", f".{layer.name}.")
        if block is None or layer.shape.biases or layer.shape.is_transposed or not layer.shape.has_gate:
            raise CheckpointError(f"{layer.name}: experts of this kind are not read out of GGUF files as they lie.")
        stem = f"blk.{block[1]}.ffn_"
        joint = self._stored.get(f"{stem}gate_up_exps.weight")
        halves = [(joint, 0, 2), (joint, 1, 2)] if joint is not None else self._halves(stem)
        sources = (*halves, (self._stored[f"{stem}down_exps.weight"], 0, 1))
        return LayerRecords(
            name=layer.name,
            num_experts=layer.num_experts,
            shape=layer.shape,
            codec=_codec_of(layer.shape, sources),
            sources=sources,
        )

    def _halves(self, stem: str) -> list[tuple[Stored, int, int]]:
        return [(self._stored[f"{stem}{half}_exps.weight"], 0, 1) for half in ("gate", "up")]


def _codec_of(shape: ExpertShape, sources: tuple[tuple[Stored, int, int], ...]) -> GgufCodec | Bf16Codec:
    tensors = [tensor for tensor, _, _ in sources]
    if all(tensor.kind == "BF16" for tensor in tensors):
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


def _kind_fits(tensor: Stored) -> bool:
    return tensor.kind in TYPES and tensor.shape[-1] % TYPES[tensor.kind].columns == 0


def _matrices(checkpoint: Checkpoint) -> set[str]:
    """Weights of linears, which may stay in a type of GGUF."""
    return {f"{name}.weight" for name, module in checkpoint.model.named_modules() if type(module) is nn.Linear}
